"""The distillers: ``DISK``, each method of ``METHODS`` by its name, and each weighted by the guide, ``DISK_<NAME>``.

``forward`` is stateless, as ``DataParallel`` discards what a replica's forward changes. Its losses have one value per
sample, whose mean is correct for any split of the batch. With a trainer that is not one of ``trainers``, each replica
evaluates DiSK's loss on its own part and so has its own hinge in eq. (3).
"""

from typing import Any

import torch
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._base import Distiller
from torch import Tensor, nn
from yacs.config import CfgNode

from disk_plugin import DualScheduler
from disk_plugin.features import METHODS, Guided, GuidedTerms
from disk_plugin.features.method import Method, Outputs
from disk_plugin.replay import GuideReplay

from . import alternating, config
from .feature_maps import build_method, outputs_of, pooled, probe, shown
from .method_distiller import MethodDistiller, base_arguments, ce_loss, check_trainer, count_added

Inputs = dict[str, Tensor]
_LOSS = "loss."  # before the name of a method's loss, among what is gathered from replicas


class GuidedDistiller(Distiller):
    """``DISK`` and each ``DISK_<NAME>``: has guide and schedule, and saves both in every checkpoint.

    Attributes:
        method_name: of the method that the guide weights (Kag et al., A.7); None for DiSK itself, eq. (5).
        epochs_per_iteration: epochs of the host per step of the schedule: the student's passes in an outer iteration of
            Algorithm 1, else 1.
        gathers: set by a trainer that evaluates ``terms`` itself, once, over the gathered outputs of all replicas.
        stateful: objects with ``state_dict`` that are saved in this module's checkpoints, by name.
    """

    method_name: str | None = None
    ce_weight = 0.0

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        # before the guide, so that with one seed a method alone starts from the same values
        method = None if self.method_name is None else self._built(self.method_name, student, teacher, cfg)
        super().__init__(student, teacher, **base_arguments(cfg))
        teacher.requires_grad_(False)
        check_trainer(cfg)
        self.joint = cfg.SOLVER.TRAINER != "disk"
        alternating.check_passes(cfg)
        self.epochs_per_iteration = 1 if self.joint else cfg.DISK.ALTERNATING.STUDENT_PASSES
        logits, features = probe(teacher, cfg)
        self._use_features = bool(cfg.DISK.GUIDE.USE_FEATURES) and not cfg.DISK.UNIFORM
        self.disk = config.build_loss(cfg, logits.shape[1], pooled(features).shape[1] if self._use_features else 0)
        self.dual = config.build_dual(cfg, self.disk, self.epochs_per_iteration)
        self.gathers = False
        self.stateful: dict[str, DualScheduler | torch.optim.Optimizer | GuideReplay] = {"dual": self.dual}
        if method is not None:
            self.add_module(str(self.method_name), method)
            Guided(self.disk, method, **self._weighing)  # validates before anything is written

    def _built(self, name: str, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> Method:
        kind, section = METHODS[name], f"DISK_{name.upper()}"
        settings, self._weighing = config.method_settings(cfg, section, kind), config.weighing(cfg, section, kind)
        self.ce_weight = config.ce_weight(cfg, section, kind)
        method, self._teacher_map = build_method(kind, student, teacher, cfg, settings)
        return method

    @property
    def method(self) -> Method | None:
        """The method, whose name is that of its dictionary in a checkpoint's keys."""
        return None if self.method_name is None else getattr(self, self.method_name)

    @property
    def guided(self) -> Guided:
        """Method and guide; a new object, as a replica has its own modules."""
        return Guided(self.disk) if self.method is None else Guided(self.disk, self.method, **self._weighing)

    def train(self, mode: bool = True) -> "GuidedDistiller":
        """Set the mode; the teacher, and a guide that is not trained in the same step, stay in evaluation mode."""
        super().train(mode)
        if not self.joint:
            self.disk.guide.eval()
        return self

    def outputs(self, image: Tensor, target: Tensor) -> tuple[Tensor, Inputs]:
        """Return the prediction (N, C) and, by name, the other per-sample tensors that ``terms`` needs."""
        method = self.method
        if method is None:
            logits, _ = outputs_of(self.student, image)
            return logits, self.guide_inputs(image)[0]
        inputs, features = self.guide_inputs(image)
        teacher = shown(inputs["teacher_logits"], features, method.reads_of("teacher"), self._teacher_map)
        logits, losses = method.evaluate(self.student_outputs(image), teacher, target)
        return logits, {**inputs, **{f"{_LOSS}{name}": loss for name, loss in losses.items()}}

    def student_outputs(self, image: Tensor) -> Outputs:
        """Run the student; return what the method reads."""
        logits, features = outputs_of(self.student, image)
        reads = frozenset[str]() if self.method is None else self.method.reads_of("student")
        return shown(logits, features, reads, model=self.student)

    def teacher_outputs(self, image: Tensor) -> Outputs:
        """Run the teacher; return what the method reads."""
        inputs, features = self.guide_inputs(image)
        reads = frozenset[str]() if self.method is None else self.method.reads_of("teacher")
        return shown(inputs["teacher_logits"], features, reads, self._teacher_map)

    def terms(self, logits: Tensor, target: Tensor, inputs: Inputs, epoch: int) -> GuidedTerms:
        """Evaluate the losses of these samples, over which the hinge is, in an epoch counted from 1."""
        self.set_epoch(epoch)
        return self.guided.weigh(logits, target, *read(inputs))

    def forward_test(self, image: Tensor) -> Tensor:
        """Return the logits of inference."""
        outputs = self.student_outputs(image)
        return outputs.logits if self.method is None else self.method.predict(outputs)

    def forward_train(self, image: Tensor, target: Tensor, epoch: int, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the prediction and the losses per sample, or, if ``gathers``, what the trainer needs for them."""
        logits, inputs = self.outputs(image, target)
        if self.gathers:
            return logits, inputs
        if self.dual.rule != "cosine":
            raise RuntimeError(
                f"DISK.DUAL.RULE {self.dual.rule} learns from each epoch and so needs a trainer out of trainer_dict, "
                f"as it is after register(): this one never tells the schedule that an epoch has ended"
            )
        terms = self.terms(logits, target, inputs, epoch)
        counted = terms.disk.counted
        loss = terms.loss * (len(counted) / counted.sum().clamp(min=1))  # the host takes the mean
        return logits, {"loss_disk": loss} | ce_loss(logits, target, self.ce_weight, self.disk.ignore_index)

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Write multiplier and budget of an epoch, counted from 1, as a replica knows only the epoch."""
        if self.dual.rule != "ascent":  # with "ascent" they depend on the run
            multiplier, budget = self.dual((epoch - 1) // self.epochs_per_iteration)
            self.disk.multiplier.fill_(multiplier)
            self.disk.budget.fill_(budget)

    def guide_inputs(self, image: Tensor) -> tuple[Inputs, dict[str, Any]]:
        """Return the guide's inputs (the teacher's logits, and features if used), and all of the teacher's features."""
        with torch.no_grad():
            logits, features = outputs_of(self.teacher, image)
        inputs = {"teacher_logits": logits}
        if self._use_features:
            inputs["teacher_features"] = pooled(features)
        return inputs, features

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """Return what the host's optimizer trains, with the guide unless Algorithm 1 gives it its own."""
        own = list(self.disk.parameters()) if self.joint else []
        trained = [] if self.method is None else self.method.trainable_parameters()
        return super().get_learnable_parameters() + own + trained

    def get_extra_parameters(self) -> int:
        """Return the number of parameters that training adds to the student."""
        return count_added([self.disk] if self.method is None else [self.disk, self.method], self.teacher)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of schedule and guide's optimizer, which is in every checkpoint the host writes."""
        return {name: carried.state_dict() for name, carried in self.stateful.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the state of schedule and guide's optimizer."""
        if set(state) != set(self.stateful):
            raise RuntimeError(
                f"the checkpoint holds the state of {sorted(state)}, this run needs that of {sorted(self.stateful)}: "
                f"was it written with another SOLVER.TRAINER?"
            )
        for name, carried in self.stateful.items():
            carried.load_state_dict(state[name])


def read(inputs: Inputs) -> tuple[Outputs, dict[str, Tensor]]:
    """Split a replica's output into what the guide reads of the teacher and the method's losses."""
    losses = {name.removeprefix(_LOSS): value for name, value in inputs.items() if name.startswith(_LOSS)}
    return Outputs(inputs["teacher_logits"], inputs.get("teacher_features")), losses


def distillers() -> dict[str, type[Distiller]]:
    """Return the distillers by their name in ``DISTILLER.TYPE``."""
    found: dict[str, type[Distiller]] = {"DISK": GuidedDistiller}
    for name, kind in METHODS.items():
        attributes = {"method_name": name, "__doc__": kind.__doc__}
        found[name.upper()] = type(name.upper(), (MethodDistiller,), attributes)
        found[f"DISK_{name.upper()}"] = type(f"DISK_{name.upper()}", (GuidedDistiller,), attributes)
    return found


def predicting_method(distiller: Any) -> str | None:
    """Return the name of the method that predicts for a distiller (object or class), None if the student does."""
    name = getattr(distiller, "method_name", None)
    return name if name is not None and METHODS[name].own_prediction else None


def add() -> None:
    """Add the distillers to the host's dictionary; a method that the host has itself is not replaced."""
    for name, kind in distillers().items():
        own = distiller_dict.get(name)
        if own is None or (isinstance(own, type) and issubclass(own, MethodDistiller | GuidedDistiller)):
            distiller_dict[name] = kind
