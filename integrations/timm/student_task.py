"""A task's student for the host: validation, EMA, compiling and clipping."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.task import LogitDistillationTask
from timm.utils import ModelEmaV3, unwrap_model
from torch import nn

from disk_plugin import DiSKLoss

from .clipping import clip_together
from .recipe import Recipe
from .trainable import DiSKTrainableModule


class StudentTask(LogitDistillationTask):
    """A task that trains student and guide, and gives the host the student alone.

    Attributes:
        disk: the ``DiSKLoss`` that owns the guide.
        recipe: of the alternation; None if the guide is trained with the student.
        clips_by_norm: False for a host that clips each value by itself.
    """

    disk: DiSKLoss
    recipe: Recipe | None
    trainable_module: Any
    eval_model: Any
    clips_by_norm = True

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile student and guide, the student alone for validation, and the teacher."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = torch.compile(self.student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.teacher.compile(**options)
        return self.eval_model

    @property
    def student(self) -> nn.Module:
        """The model of inference, unwrapped: the bare student, or the ``MethodModel``."""
        return unwrap_model(self.trainable_module).student

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the model of inference."""
        resolved = super().get_eval_model(module, ema)
        inner = unwrap_model(resolved)
        return inner.student if isinstance(inner, DiSKTrainableModule) else resolved

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> nn.Module:
        """Set up the EMA of the model of inference, without the guide."""
        self.trainable_module_ema = ModelEmaV3(self.student, decay, use_warmup=use_warmup, device=device, **kwargs)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Update the EMA."""
        if self.has_ema():
            self.trainable_module_ema.update(self.student, step=step)

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterator[nn.Parameter]:
        """Yield the parameters of student (without its head for ``exclude_head``) and guide, for one global norm.

        If the guide's gradient has a larger norm than the student's, it is first scaled down to it. So the global norm
        is at most sqrt(2) times the student's, and the guide cannot crowd out the student. Call it after the backward
        pass. There is no scaling without a global norm: for AGC (``exclude_head``) and with ``clips_by_norm`` False.
        """
        student = list(self.student.parameters())[: -2 if exclude_head else None]
        method = unwrap_model(self.trainable_module).method
        student += [] if method is None else method.trainable_parameters()
        guide = list(self.disk.guide.parameters()) if self.recipe is None else []
        return clip_together(student, guide, shortened=self.clips_by_norm and not exclude_head)
