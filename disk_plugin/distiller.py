"""Student, teacher and loss as one module: for loops and hosts whose criterion sees nothing but output and target."""

from typing import Any

import torch
from torch import Tensor, nn

from .features.guided import Guided, GuidedTerms
from .features.method import Outputs
from .guide import reads_features
from .loss import DiSKLoss
from .taps import FeatureTap, logits_of, with_features


class Distiller(nn.Module):
    """A student that learns from a teacher: ``distiller(x, target).loss.backward()``, ``distiller(x)`` at inference.

    **This module has parameters**: the student's, the guide's and, if there is one, the method's; give
    ``distiller.parameters()`` to the optimizer. The teacher is frozen and in evaluation mode, moves with the module,
    and is in neither its parameters nor its ``state_dict``.

    Args:
        student: any classifier; its output may be a Tensor, a tuple, a dict or an object, see ``taps.logits_of``.
        teacher: a classifier of the same classes.
        loss: a ``DiSKLoss``, or a ``Guided`` around it and a method that reads logits or features.

    Shape:
        x as both models take it; target (N,) or the logits' shape; returns :class:`disk_plugin.features.GuidedTerms`,
        scalars, or without a target the student's own output.

    Raises:
        ValueError: a method that reads feature maps, which an arbitrary model does not show; a teacher without a Linear
            layer where its features are read.
        TypeError: ``loss`` is neither.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> student, teacher = nn.Linear(4, 10), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> distiller = Distiller(student, teacher, DiSKLoss(GuideHead(num_classes=10, feature_dim=8)))
        >>> distiller(torch.randn(3, 4), torch.tensor([1, 2, 3])).loss.backward()
        >>> distiller.eval()(torch.randn(3, 4)).shape
        torch.Size([3, 10])
    """

    teacher: nn.Module
    _read_student: nn.Module

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: DiSKLoss | Guided) -> None:
        super().__init__()
        if not isinstance(loss, DiSKLoss | Guided):
            raise TypeError(f"loss must be a DiSKLoss or a Guided, got {type(loss).__name__}")
        self.student = student.model if isinstance(student, FeatureTap) else student
        self.guided = loss if isinstance(loss, Guided) else Guided(loss)
        method = self.guided.method
        reads = frozenset[str]() if method is None else method.reads
        if reads - {"features"}:
            raise ValueError(
                f"{type(method).__name__} reads {sorted(reads)}, of which any classifier shows features alone: give "
                f"Guided its outputs in a loop of your own"
            )
        if reads or reads_features(self.guided.disk.guide):
            teacher = teacher if isinstance(teacher, FeatureTap) else with_features(teacher.eval())
        if reads and not isinstance(student, FeatureTap):
            student = with_features(student)
        # no submodules: the teacher is neither trained nor saved, a tap would give the student's keys a prefix
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        object.__setattr__(self, "_read_student", student)

    def forward(self, x: Any, target: Tensor | None = None) -> Any:
        """Return the terms of a training batch or, without a target, the student's output."""
        if target is None:
            return self.student(x)
        with torch.no_grad():
            teacher = _outputs(self.teacher, x)
        terms: GuidedTerms = self.guided.terms(_outputs(self._read_student, x), teacher, target)
        return terms

    def train(self, mode: bool = True) -> "Distiller":
        """Set the mode of student, guide and method; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Distiller":
        """Move the teacher along."""
        self.teacher._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _outputs(model: nn.Module, x: Any) -> Outputs:
    """Run a model once; a tapped one shows its features too."""
    if isinstance(model, FeatureTap):
        return Outputs(*model(x))
    return Outputs(logits_of(model(x)))
