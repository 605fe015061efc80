"""The distillers ``DISK``, ``SIMKD`` and ``DISK_SIMKD``.

``forward`` is stateless, as ``DataParallel`` discards what a replica's forward changes, and its losses are vectors with
one value per sample, whose mean is right however the batch was split. Under a trainer that is not one of ``trainers``
each replica evaluates DiSK's loss on its own share and so has its own hinge in eq. (3).
"""

from typing import Any

import torch
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._base import Distiller
from torch import Tensor, nn
from yacs.config import CfgNode

from disk_plugin import DualScheduler
from disk_plugin.features.guided import GuidedFeatureTerms, guided_feature_terms
from disk_plugin.functional import DiSKTerms
from disk_plugin.replay import GuideReplay

from . import config
from .feature_maps import build_simkd, pooled, probe, student_map

Inputs = dict[str, Tensor]


class GuidedDistiller(Distiller):
    """What ``DISK`` and ``DISK_SIMKD`` share: the guide, its schedule and the state of both in every checkpoint.

    Attributes:
        epochs_per_iteration: how many epochs of the host one step of the schedule takes: the student's passes in an
            outer iteration of Algorithm 1, else 1.
        gathers: set by a trainer that evaluates :meth:`terms` itself, once, over the gathered outputs of all replicas.
        stateful: objects with ``state_dict`` that checkpoints of this module carry along, by name.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher)
        teacher.requires_grad_(False)
        _refuse_trainers(cfg)
        self.joint = cfg.SOLVER.TRAINER != "disk"
        config.check_passes(cfg)
        self.epochs_per_iteration = 1 if self.joint else cfg.DISK.ALTERNATING.STUDENT_PASSES
        logits, features = probe(teacher, cfg)
        self._use_features = bool(cfg.DISK.GUIDE.USE_FEATURES)
        self.disk = config.build_loss(cfg, logits.shape[1], pooled(features).shape[1] if self._use_features else 0)
        self.dual = config.build_dual(cfg, self.disk, self.epochs_per_iteration)
        self.gathers = False
        self.stateful: dict[str, DualScheduler | torch.optim.Optimizer | GuideReplay] = {"dual": self.dual}

    def train(self, mode: bool = True) -> "GuidedDistiller":
        """Set the mode; the teacher, and a guide that is not being trained, stay in evaluation mode."""
        super().train(mode)
        if not self.joint:
            self.disk.guide.eval()
        return self

    def outputs(self, image: Tensor) -> tuple[Tensor, Inputs]:
        """Return the prediction (N, C) and, by name, the other per-sample tensors that :meth:`terms` needs."""
        raise NotImplementedError

    def terms(self, logits: Tensor, target: Tensor, inputs: Inputs, epoch: int) -> DiSKTerms | GuidedFeatureTerms:
        """Evaluate the losses of these samples, in an epoch counted from 1."""
        raise NotImplementedError

    def forward_train(self, image: Tensor, target: Tensor, epoch: int, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the prediction and the losses per sample, or, if ``gathers``, what the trainer needs for them."""
        logits, inputs = self.outputs(image)
        if self.gathers:
            return logits, inputs
        if self.dual.rule != "cosine":
            raise RuntimeError(
                f"DISK.DUAL.RULE {self.dual.rule} learns from each epoch and so needs a trainer out of trainer_dict, "
                f"as it is after register(): this one never tells the schedule that an epoch has ended"
            )
        terms = self.terms(logits, target, inputs, epoch)
        counted = (terms.disk if isinstance(terms, GuidedFeatureTerms) else terms).counted
        return logits, {
            "loss_disk": terms.loss * (len(counted) / counted.sum().clamp(min=1))
        }  # the host takes the mean

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Write multiplier and budget of an epoch counted from 1: a replica knows nothing but the epoch."""
        if self.dual.rule != "ascent":  # there they follow from the run, step by step
            multiplier, budget = self.dual((epoch - 1) // self.epochs_per_iteration)
            self.disk.multiplier.fill_(multiplier)
            self.disk.budget.fill_(budget)

    def guide_inputs(self, image: Tensor) -> tuple[Inputs, dict[str, Any]]:
        """Return the teacher's logits and what the guide reads beside them, and all of the teacher's features."""
        with torch.no_grad():
            logits, features = self.teacher(image)
        inputs = {"teacher_logits": logits}
        if self._use_features:
            inputs["teacher_features"] = pooled(features)
        return inputs, features

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """Return what the host's optimizer trains: the guide too, unless Algorithm 1 gives it its own."""
        own = list(self.disk.parameters()) if self.joint else []
        return super().get_learnable_parameters() + own

    def get_extra_parameters(self) -> int:
        """Count what training adds to the student."""
        return sum(parameter.numel() for parameter in self.disk.parameters())

    def get_extra_state(self) -> dict[str, Any]:
        """Return the schedule's and the guide's optimizer's state: part of every checkpoint the host writes."""
        return {name: carried.state_dict() for name, carried in self.stateful.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them up again."""
        if set(state) != set(self.stateful):
            raise RuntimeError(
                f"the checkpoint holds the state of {sorted(state)}, this run needs that of {sorted(self.stateful)}: "
                f"was it written with another SOLVER.TRAINER?"
            )
        for name, carried in self.stateful.items():
            carried.load_state_dict(state[name])


class DISK(GuidedDistiller):
    """Distilling Scaffolded Knowledge, Kag et al. (ICLR 2023), eq. (5): section ``DISK`` of the configuration."""

    def outputs(self, image: Tensor) -> tuple[Tensor, Inputs]:
        """Return the student's logits."""
        logits, _ = self.student(image)
        return logits, self.guide_inputs(image)[0]

    def terms(self, logits: Tensor, target: Tensor, inputs: Inputs, epoch: int) -> DiSKTerms:
        """Evaluate (5) per sample; the hinge is over these samples."""
        self.set_epoch(epoch)
        features = inputs.get("teacher_features")
        return self.disk.terms(logits, inputs["teacher_logits"], target, features, reduction="none")


class SIMKD(Distiller):
    """SimKD, Chen et al. (CVPR 2022): section ``SIMKD``. It predicts through projector and teacher's classifier."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher)
        teacher.requires_grad_(False)
        _refuse_trainers(cfg)
        self.simkd, self.teacher_map = build_simkd(student, teacher, cfg, factor=cfg.SIMKD.FACTOR)
        self.feature_weight = cfg.SIMKD.FEATURE_WEIGHT

    def forward_train(self, image: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the prediction by the teacher's classifier and the feature loss per sample; no label is used."""
        with torch.no_grad():
            _, features = self.teacher(image)
        logits, error = self.simkd(student_map(self.student(image)[1]), self.teacher_map(features))
        return logits, {"loss_feature": self.feature_weight * error}

    def forward_test(self, image: Tensor) -> Tensor:
        """Return the logits of student, projector and teacher's classifier."""
        return self.simkd.predict(student_map(self.student(image)[1]))

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """Return student and projector."""
        return super().get_learnable_parameters() + self.simkd.trainable_parameters()

    def get_extra_parameters(self) -> int:
        """Count projector and classifier, which inference needs too."""
        return sum(parameter.numel() for parameter in self.simkd.parameters())


class DISK_SIMKD(GuidedDistiller):  # noqa: N801 (the host names a class as its key)
    """SimKD weighted by DiSK's guide, Kag et al., A.7: sections ``DISK_SIMKD`` and, for the guide, ``DISK``."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        # before the guide, so that with one seed SIMKD's projector starts from the same values
        simkd, teacher_map = build_simkd(student, teacher, cfg, factor=cfg.DISK_SIMKD.FACTOR)
        super().__init__(student, teacher, cfg)
        self.simkd, self.teacher_map = simkd, teacher_map
        self._feature_arguments = config.feature_arguments(cfg)

    def outputs(self, image: Tensor) -> tuple[Tensor, Inputs]:
        """Return the prediction by the teacher's classifier, and the distance to the teacher's map."""
        inputs, features = self.guide_inputs(image)
        logits, error = self.simkd(student_map(self.student(image)[1]), self.teacher_map(features))
        return logits, {**inputs, "feature_error": error}

    def terms(self, logits: Tensor, target: Tensor, inputs: Inputs, epoch: int) -> GuidedFeatureTerms:
        """Evaluate (6) and the guide's loss per sample."""
        self.set_epoch(epoch)
        return guided_feature_terms(
            self.disk,
            logits,
            inputs["teacher_logits"],
            target,
            inputs.get("teacher_features"),
            inputs["feature_error"],
            **self._feature_arguments,
            reduction="none",
        )

    forward_test = SIMKD.forward_test

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """Return student, projector and, unless Algorithm 1 gives it its own optimizer, guide."""
        return super().get_learnable_parameters() + self.simkd.trainable_parameters()

    def get_extra_parameters(self) -> int:
        """Count projector, classifier and guide."""
        return super().get_extra_parameters() + sum(parameter.numel() for parameter in self.simkd.parameters())


def _refuse_trainers(cfg: CfgNode) -> None:
    """Refuse the host's trainers that want two named losses, or batches with negative samples."""
    if cfg.SOLVER.TRAINER in ("crd", "dot", "crd_dot"):
        raise ValueError(
            f"{cfg.DISTILLER.TYPE} needs SOLVER.TRAINER base or, with a guide, disk (Algorithm 1), got "
            f"{cfg.SOLVER.TRAINER!r}"
        )


def add() -> None:
    """Put the three into the host's dictionary, which its script reads."""
    distiller_dict.update(DISK=DISK, SIMKD=SIMKD, DISK_SIMKD=DISK_SIMKD)
