"""The implementation of ``DiSKTask``: guide, schedule, epochs, checkpoints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from timm.task import DistillationTeacher
from timm.utils import unwrap_model
from torch import Tensor, nn

from disk_plugin import DiSKLoss
from disk_plugin.distributed import mean_over_processes
from disk_plugin.features import METHODS
from disk_plugin.features.guided import FeatureWeight, Guided, GuidedTerms
from disk_plugin.features.method import Method, Outputs
from disk_plugin.training import GuidedTraining, repeated

from . import arguments
from .guide_module import build_guide, reads_features
from .guide_optimizer import build_guide_optimizer, cosine
from .model import MethodModel, Parts, build_method
from .normalisation import get_image_statistics
from .recipe import Recipe
from .report import TaskReport
from .state import load
from .student_task import StudentTask
from .teacher import FrozenTeacher, check_classes, image_size, probe
from .trainable import trainable


class GuidedTask(StudentTask):
    """A task with a guide; ``DiSKTask`` documents the arguments.

    Attributes:
        disk: the ``DiSKLoss``.
        dual: its ``DualScheduler``, or None.
        training_core: the host-independent part of guided training.
    """

    model_of: Callable[..., MethodModel] = MethodModel  # for methods that predict
    teacher: Any  # the host's, then a FrozenTeacher around it

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: nn.Module | None = None,
        *,
        epochs: int | None = None,
        mode: Literal["joint", "alternating"] = "joint",
        guide: Mapping[str, Any] | nn.Module | None = None,
        dual: Mapping[str, Any] | None = None,
        alternating: Mapping[str, Any] | None = None,
        method: str | type[Method] | Method | None = None,
        method_settings: Mapping[str, Any] | None = None,
        weight: FeatureWeight = "one_minus_guide",
        input_size: tuple[int, int, int] | None = None,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        allow_fresh_guide: bool = False,
        **settings: Any,
    ) -> None:
        host, loss = arguments.split(settings)
        arguments.check_modes(mode, epochs, dual, alternating, input_size, loss)
        arguments.check_student(student_model, teacher_model)
        super().__init__(student_model, teacher_model, criterion, **host)
        arguments.check_criterion(self.criterion)
        check_classes(self.teacher.model, student_model, by_name=isinstance(teacher_model, str))
        size = image_size(student_model, input_size)
        wrapped = isinstance(teacher_model, DistillationTeacher)
        self.teacher = FrozenTeacher(self.teacher, size[0], from_config=not wrapped)
        images = get_image_statistics(student_model, size[0], input_mean, input_std)
        self.student_mean, self.student_std = (each.to(self.device) for each in images)
        self.allow_fresh_guide = allow_fresh_guide
        guide = {} if guide is None else guide
        self._use_features = reads_features(guide)
        kind = arguments.method_class(method, METHODS)
        self._reads_features = self._use_features or (kind is not None and bool(kind.reads_of("teacher")))
        with torch.random.fork_rng(devices=[]):  # all drawn on the CPU: with one seed a baseline sees the same batches
            image = torch.randn(1, *size).to(self.device, self.dtype)
            head = self._build_guide(student_model, image, guide)
            self._parts = None if kind is None else self._build_method(kind, student_model, image, method_settings)
        # the criterion is the host's, so this loss's own cross-entropy has weight 0
        weights = {"ce_weight": 0.0, "distill_weight": self.distill_loss_weight, "temperature": self.temperature}
        self.disk = DiSKLoss(head, **{**loss, **weights}).to(self.device)
        self.disk.reduce_mean = mean_over_processes
        self.recipe = Recipe(**(alternating or {})) if mode == "alternating" else None
        built = None if self._parts is None else self._parts.method
        guided = Guided(self.disk, built, weight=weight, method_weight=self.distill_loss_weight)
        self.training_core = self._core(guided, epochs, dual)
        self.dual, self.schedule = self.training_core.schedule.dual, self.training_core.schedule
        self.guide_passes, self._judged = self.training_core.guide_passes, False
        in_step = head if self.recipe is None else None
        self.trainable_module = trainable(student_model, in_step, self._parts, self.model_of)
        self.train()

    def _core(self, guided: Guided, epochs: int | None, dual: Mapping[str, Any] | None) -> GuidedTraining:
        own: dict[str, Any] = {"epochs": epochs, "recipe": self.recipe, "dual": dual, "report": TaskReport}
        if self.recipe is not None:
            own["guide_optimizer"] = build_guide_optimizer(self.recipe, self.disk)
            own["guide_rate"] = cosine(self.recipe.guide_lr, epochs)
        return GuidedTraining(guided, **own)

    @property
    def report(self) -> TaskReport:
        """Means over the epoch's samples so far."""
        return cast(TaskReport, self.training_core.report)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 (timm's name)
        """Evaluate the loss of a batch.

        Args:
            input: images (N, C, H, W), normalised with ``input_mean`` and ``input_std``.
            target: class indices (N,) or probabilities (N, classes).

        Returns:
            ``loss`` to backpropagate; ``output``, the logits (N, classes). Detached scalars: ``task_loss``, ``kd_loss``
            (L_dist, or the method's weighted loss), ``logged_loss`` (>= 0: the weighted task loss plus DiSK's
            ``logged_loss``), and the means ``usage``, ``guide`` and ``discount``.
        """
        teacher_logits, teacher_features, shown = self._teacher(input)
        teacher = Outputs(teacher_logits, teacher_features)
        logits, guide_logits, losses = self.trainable_module(input, target, teacher, shown)
        task_loss = self.criterion(logits, target)
        terms = self.training_core.terms(logits, target, teacher, losses, guide_logits=guide_logits)
        if self.disk.training:
            self.report.add_task_loss(task_loss, len(logits))
        means = terms.mean()
        loss = self.task_loss_weight * task_loss + self.training_core.descended(means)
        disk, kd_loss = means.disk, means.disk.distill if self._parts is None else means.feature
        logged = self.task_loss_weight * task_loss.detach() + means.logged_loss
        watched = {"task_loss": task_loss.detach(), "kd_loss": kd_loss, "logged_loss": logged}
        watched |= {name: getattr(disk, name) for name in ("usage", "guide", "discount")}
        return {"loss": loss, "output": logits, **watched}

    def begin_epoch(self, epoch: int) -> None:
        """Set the schedule to an epoch, counted from 0; a resumed run may start at any."""
        self.training_core.begin_epoch(epoch)

    def run_guide_passes(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        *,
        prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda image, target: (image, target),
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> int:
        """Make Algorithm 1's guide passes before this epoch; return their number over the data.

        Args:
            loader: of the training data.
            prepare: (image, target) of the loader -> images and target on the device.
            autocast: the host's autocast context.
        """
        if self.guide_passes is None:
            return 0

        def guide_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            with autocast():
                return self._guide_terms(*prepare(*batch)).mean().guide_loss

        training = self.trainable_module.training
        self.trainable_module.eval()
        try:
            return self.guide_passes.run(self.schedule.epoch, repeated(loader), guide_loss)
        finally:
            self.trainable_module.train(training)

    def end_epoch(self) -> dict[str, float]:
        """Step the schedule; return the epoch's multiplier, budget, and means over the samples of all ranks."""
        report, trained = self.report, self.schedule.epoch > 0
        means = self.training_core.end_epoch()
        means |= report.logged(self.task_loss_weight)
        for name in ("student_accuracy", "teacher_accuracy"):
            means.pop(name, None)  # logged in percent, as timm's top1
        classes = unwrap_model(self.student).num_classes
        self._judged = report.judge_teacher(classes, quiet=self._judged, trained=trained)
        return means

    def train(self, mode: bool = True) -> "GuidedTask":
        """Set the mode; the teacher, and a guide with its own optimizer, stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        if self.guide_passes is not None:
            self.disk.guide.eval()
        return self

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> "GuidedTask":
        """Wrap student and guide in DistributedDataParallel, on CPUs too."""
        if self.guide_passes is not None:
            self.guide_passes.broadcast()
        return super().prepare_distributed(None if self.device.type == "cpu" else device_ids, **ddp_kwargs)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of guide, method and schedule: tensors, numbers and containers of them."""
        return {} if ema else {name: part.state_dict() for name, part in self._stateful.items()}

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load the state of guide, method and schedule.

        Raises:
            RuntimeError: there is none and ``allow_fresh_guide`` is not set, or it is of another mode or guide.
        """
        if not ema:
            load(self._stateful, state, allow_fresh_guide=self.allow_fresh_guide)

    @property
    def _stateful(self) -> dict[str, Any]:
        """The parts in ``task_state``, by name; a method that predicts is in the model that the host saves."""
        parts = self.training_core.stateful
        if self._parts is not None and (self._parts.method.own_prediction or not self._parts.method.state_dict()):
            del parts["method"]
        return parts

    def _build_guide(self, student: nn.Module, image: Tensor, guide: Mapping[str, Any] | nn.Module) -> nn.Module:
        """Try the teacher and return the guide."""
        classes = unwrap_model(student).num_classes
        logits, pre_logits, _ = probe(self.teacher, self._normalize(image), classes, features=self._reads_features)
        return build_guide(guide, logits, pre_logits if self._use_features else None)

    def _build_method(self, kind: type[Method] | Method, student: nn.Module, image: Tensor, settings: Any) -> Parts:
        how: dict[str, Any] = {"teacher_image": self._normalize(image)}
        how["settings"] = arguments.method_settings(kind, settings)
        return build_method(kind, student, self.teacher.model, image, **how)

    def _normalize(self, input: Tensor) -> Tensor:  # noqa: A002 (timm's name)
        return self.teacher.normalize_input(input, self.student_mean, self.student_std)

    @torch.no_grad()
    def _teacher(self, input: Tensor) -> tuple[Tensor, Tensor | None, Outputs | None]:  # noqa: A002 (timm's name)
        """Run the teacher; return its logits, what the guide reads beside them, and what the method reads."""
        logits, pre_logits, last_map = self.teacher.outputs(self._normalize(input), features=self._reads_features)
        shown = None if self._parts is None else self._parts.teacher_outputs(logits, pre_logits, last_map)
        return logits, pre_logits if self._use_features else None, shown

    def _guide_terms(self, input: Tensor, target: Tensor) -> GuidedTerms:  # noqa: A002 (timm's name)
        """Evaluate the terms of a guide pass, without gradient for the student."""
        teacher_logits, teacher_features, shown = self._teacher(input)
        teacher = Outputs(teacher_logits, teacher_features)
        with torch.no_grad():
            logits, _, losses = self.trainable_module(input, target, teacher, shown)
        return self.training_core.guided.weigh(logits, target, teacher, losses)
