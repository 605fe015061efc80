"""What DiSK's tasks share: guide, schedule, epochs, checkpoints, and what the host asks of a task."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.task import DistillationTeacher
from timm.utils import unwrap_model
from torch import Tensor, nn

from disk_plugin import DiSKLoss
from disk_plugin.distributed import mean_over_processes, share_student_temperature
from disk_plugin.features.guided import GuidedFeatureTerms
from disk_plugin.functional import DiSKTerms

from . import arguments
from .guide_module import build_guide, reads_features
from .guide_passes import GuidePasses
from .normalisation import of_images
from .recipe import Recipe
from .report import TaskReport
from .schedule import Schedule
from .state import load, state_of
from .student_task import StudentTask
from .teacher import FrozenTeacher, TeacherOutputs, check_classes, image_size, probe
from .trainable import DiSKTrainableModule


class GuidedTask(StudentTask):
    """A task with a guide; ``DiSKTask`` documents the arguments.

    Attributes:
        disk: the ``DiSKLoss``.
        dual: its ``DualScheduler``, or None.
        report: means over the epoch's samples so far.
        matches_features: whether the task reads the teacher's last map.
    """

    matches_features = False
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
        input_size: tuple[int, int, int] | None = None,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        allow_fresh_guide: bool = False,
        **settings: Any,
    ) -> None:
        host, loss = arguments.split(settings)
        arguments.check_modes(mode, epochs, dual, alternating, input_size, loss)
        arguments.check_student(student_model)
        super().__init__(student_model, teacher_model, criterion, **host)
        arguments.check_criterion(self.criterion)
        check_classes(self.teacher.model, student_model, by_name=isinstance(teacher_model, str))
        size = image_size(student_model, input_size)
        wrapped = isinstance(teacher_model, DistillationTeacher)
        self.teacher = FrozenTeacher(self.teacher, size[0], from_config=not wrapped)
        images = of_images(student_model, size[0], input_mean, input_std)
        self.student_mean, self.student_std = (each.to(self.device) for each in images)
        self.allow_fresh_guide = allow_fresh_guide
        guide = {} if guide is None else guide
        self._use_features = reads_features(guide)
        self._reads_features = self._use_features or self.matches_features
        with torch.random.fork_rng(devices=[]):  # all on the CPU: with one seed a baseline sees the same batches
            image = torch.randn(1, *size).to(self.device, self.dtype)
            student, head = self._build(student_model, image, guide)
        # the criterion is the host's, so that this loss's own cross-entropy has no weight
        weights = {"ce_weight": 0.0, "distill_weight": self.distill_loss_weight, "temperature": self.temperature}
        self.disk = DiSKLoss(head, **{**loss, **weights}).to(self.device)
        self.disk.reduce_mean = mean_over_processes
        self.recipe = Recipe(**(alternating or {})) if mode == "alternating" else None
        self.guide_passes = None if self.recipe is None else GuidePasses(self.disk, self.recipe, epochs)
        self.schedule = Schedule(self.disk, epochs, 1 if self.recipe is None else self.recipe.student_passes, dual)
        self.dual = self.schedule.dual
        self._stateful = {"disk": self.disk, "dual": self.dual, "guide_passes": self.guide_passes}
        self.trainable_module = DiSKTrainableModule(student, head if self.recipe is None else None)
        self.report, self._judged = TaskReport(), False
        self.train()

    def trained(self, student: nn.Module, image: Tensor) -> nn.Module:
        """Return what is trained and what inference runs; ``image`` is one to try it on."""
        raise NotImplementedError

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        teacher: TeacherOutputs,
        guide_logits: Tensor | None,
        feature_error: Tensor | None,
    ) -> DiSKTerms | GuidedFeatureTerms:
        """Evaluate the losses per sample; where the guide is outside the trainable module it is called here."""
        raise NotImplementedError

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 (timm's name)
        """Evaluate a batch.

        Args:
            input: images (N, C, H, W), normalised with ``input_mean`` and ``input_std``.
            target: class indices (N,) or probabilities (N, classes).

        Returns:
            ``loss`` to backpropagate; ``output`` (N, classes); detached: ``task_loss``, ``kd_loss`` (L_dist, or the
            weighted feature term), ``logged_loss`` (>= 0: the weighted task loss plus DiSK's ``logged_loss``),
            ``usage``, ``guide``, ``discount`` (means).
        """
        teacher = self._teacher(input)
        logits, guide_logits, feature_error = self.trainable_module(input, *teacher)
        task_loss = self.criterion(logits, target)
        terms = self.terms(logits, target, teacher, guide_logits, feature_error)
        if self.disk.training:
            self.report.add(terms)
            self.report.add_task_loss(task_loss, len(logits))
            share_student_temperature(self.disk)
            if self.guide_passes is not None:
                self.guide_passes.record(self.schedule.epoch, logits, target, teacher)
        means: Any = terms.mean()
        loss = self.task_loss_weight * task_loss + (means.loss if self.recipe is None else means.student_loss)
        disk, kd_loss = (means.disk, means.feature) if self.matches_features else (means, means.distill)
        logged = self.task_loss_weight * task_loss.detach() + means.logged_loss
        shown = {"task_loss": task_loss.detach(), "kd_loss": kd_loss, "logged_loss": logged}
        shown |= {"usage": disk.usage, "guide": disk.guide, "discount": disk.discount}
        return {"loss": loss, "output": logits, **shown}

    def begin_epoch(self, epoch: int) -> None:
        """Bring multiplier and budget to an epoch counted from 0, wherever a resumed run starts."""
        self.report = TaskReport()
        self.schedule.begin(epoch)

    def run_guide_passes(self, loader: Iterable[tuple[Tensor, Tensor]], **around: Any) -> int:
        """Make Algorithm 1's guide passes before this epoch; return how many; ``around``: see ``GuidePasses.run``."""
        if self.guide_passes is None:
            return 0
        training = self.trainable_module.training
        self.trainable_module.eval()
        try:
            return self.guide_passes.run(self.schedule.epoch, loader, self._guide_terms, **around)
        finally:
            self.trainable_module.train(training)

    def end_epoch(self) -> dict[str, float]:
        """Step the schedule; return the epoch's multiplier, budget and means over the samples of all processes."""
        means = {"multiplier": float(self.disk.multiplier), "budget": float(self.disk.budget)}
        if self.disk.level is not None:
            means["discount_target"] = float(self.disk.level.target)
        self.report.sum_over_processes()
        means |= self.report.logged(self.task_loss_weight)
        classes, trained = unwrap_model(self.student).num_classes, self.schedule.epoch > 0
        self._judged = self.report.judge_teacher(classes, quiet=self._judged, trained=trained)
        self.report = TaskReport()
        self.schedule.end()
        if self.guide_passes is not None:
            self.guide_passes.run_replay(self.schedule.epoch)
        return means

    def train(self, mode: bool = True) -> "GuidedTask":
        """Set the mode; the teacher, and a guide that is not being trained, stay in evaluation mode."""
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
        """Return guide, multiplier, budget and their progress: tensors, numbers and containers of them."""
        return {} if ema else state_of(self._stateful)

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Take them up again.

        Raises:
            RuntimeError: there is none and ``allow_fresh_guide`` is not set, or it is that of another mode or guide.
        """
        if not ema:
            load(self._stateful, state, allow_fresh_guide=self.allow_fresh_guide)

    def _build(
        self, student: nn.Module, image: Tensor, guide: Mapping[str, Any] | nn.Module
    ) -> tuple[nn.Module, nn.Module]:
        """Try the teacher; return what is trained and the guide."""
        classes = unwrap_model(student).num_classes
        logits, pre_logits, _ = probe(self.teacher, self._normalize(image), classes, features=self._reads_features)
        head = build_guide(guide, logits, pre_logits if self._use_features else None)
        return self.trained(student, image), head

    def _normalize(self, input: Tensor) -> Tensor:  # noqa: A002 (timm's name)
        return self.teacher.normalize_input(input, self.student_mean, self.student_std)

    @torch.no_grad()
    def _teacher(self, input: Tensor) -> TeacherOutputs:  # noqa: A002 (timm's name)
        """Run the teacher; what neither guide nor feature matching reads is None."""
        logits, pre_logits, last_map = self.teacher.outputs(self._normalize(input), features=self._reads_features)
        return logits, pre_logits if self._use_features else None, last_map if self.matches_features else None

    def _guide_terms(self, input: Tensor, target: Tensor) -> DiSKTerms | GuidedFeatureTerms:  # noqa: A002
        """Evaluate the terms of a guide pass: nothing of the student is trained."""
        teacher = self._teacher(input)
        with torch.no_grad():
            logits, _, feature_error = self.trainable_module(input, *teacher)
        return self.terms(logits, target, teacher, None, feature_error)
