"""A method alone, without the guide, as a distiller of the host."""

import inspect
from typing import Any

import torch
from mdistiller.distillers._base import Distiller
from mdistiller.engine import trainer_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from yacs.config import CfgNode

from disk_plugin.features import METHODS
from disk_plugin.features.method import Method, Outputs

from . import config
from .feature_maps import build_method, outputs_of, shown
from .trainer_fit import unfit


class MethodDistiller(Distiller):
    """A method alone, with the settings of section ``<NAME>``; a subclass per method sets ``method_name``."""

    method_name: str

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher, **base_arguments(cfg))
        teacher.requires_grad_(False)
        check_trainer(cfg)
        kind, section = METHODS[self.method_name], self.method_name.upper()
        method, self.teacher_map = build_method(kind, student, teacher, cfg, config.method_settings(cfg, section, kind))
        self.add_module(self.method_name, method)
        self.loss_weight = config.loss_weight(cfg, section, kind)
        self.ce_weight = config.ce_weight(cfg, section, kind)

    @property
    def method(self) -> Method:
        """The method, whose name is that of its dictionary in a checkpoint's keys."""
        method: Method = getattr(self, self.method_name)
        return method

    def forward_train(self, image: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the prediction and the losses per sample."""
        teacher = self.teacher_outputs(image)
        prediction, losses = self.method.evaluate(self.student_outputs(image), teacher, target)
        found = {f"loss_{name}": self.loss_weight * loss for name, loss in losses.items()}
        return prediction, found | ce_loss(prediction, target, self.ce_weight)

    def forward_test(self, image: Tensor) -> Tensor:
        """Return the logits of inference."""
        return self.method.predict(self.student_outputs(image))

    def student_outputs(self, image: Tensor) -> Outputs:
        """Run the student; return what the method reads."""
        logits, features = outputs_of(self.student, image)
        return shown(logits, features, self.method.reads_of("student"), model=self.student)

    def teacher_outputs(self, image: Tensor) -> Outputs:
        """Run the teacher; return what the method reads."""
        with torch.no_grad():
            logits, features = outputs_of(self.teacher, image)
        return shown(logits, features, self.method.reads_of("teacher"), self.teacher_map)

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the student and those that the method trains."""
        return super().get_learnable_parameters() + self.method.trainable_parameters()

    def get_extra_parameters(self) -> int:
        """Return the number of parameters that the method adds to student and teacher."""
        return count_added([self.method], self.teacher)


def ce_loss(logits: Tensor, target: Tensor, weight: float, ignore_index: int = -100) -> dict[str, Tensor]:
    """Return the cross-entropy for a method without one, as a loss per sample, whose mean the host takes."""
    if not weight:
        return {}
    counted = (target != ignore_index).sum().clamp(min=1)
    loss = cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    return {"loss_ce": weight * loss * (len(target) / counted)}


def count_added(modules: list[nn.Module], teacher: nn.Module) -> int:
    """Count the parameters of modules, which may use parts of the teacher, without the teacher's."""
    taught = set(teacher.parameters())
    return sum(each.numel() for module in modules for each in module.parameters() if each not in taught)


def notes_of(method: Method | None, name: str) -> list[str]:
    """Return what to tell before training: how many parameters the method trains."""
    count = 0 if method is None else sum(each.numel() for each in method.trainable_parameters())
    return [f"{name} trains {count:,} parameters of its own beside the student's"] if count else []


def base_arguments(cfg: CfgNode) -> dict[str, CfgNode]:
    """Return what a fork's ``Distiller`` takes beside student and teacher."""
    return {"cfg": cfg} if "cfg" in inspect.signature(Distiller.__init__).parameters else {}


def check_trainer(cfg: CfgNode) -> None:
    """Raise ValueError if the trainer shows a distiller other things than image, target, epoch, or wants named losses.

    Raises:
        ValueError: it does; the message says what it passes or reads.
    """
    trainer = trainer_dict.get(cfg.SOLVER.TRAINER)
    known = {"crd": "shows it negative samples", "dot": "reads two losses by name", "crd_dot": "does both"}
    reason = unfit(trainer) if isinstance(trainer, type) else known.get(cfg.SOLVER.TRAINER)
    if reason is not None and cfg.SOLVER.TRAINER in ("base", "disk"):
        raise ValueError(
            f"{cfg.DISTILLER.TYPE} cannot be trained by this checkout's own trainers: the base one {reason}"
        )
    if reason is not None:
        raise ValueError(
            f"{cfg.DISTILLER.TYPE} needs SOLVER.TRAINER base or, with a guide, disk (Algorithm 1), got "
            f"{cfg.SOLVER.TRAINER!r}, which {reason}"
        )
