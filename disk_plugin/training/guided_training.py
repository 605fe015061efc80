"""A run of guided training, driven by a host: losses, guide passes, ends of epochs, state."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .._form import target_of
from .._modes import in_mode
from ..distributed import mean_over_processes
from ..epoch_report import EpochReport
from ..features.guided import Guided, GuidedTerms
from ..features.method import Outputs, to_outputs
from .guide_passes import GuidePasses, repeated
from .recipe import Recipe
from .schedule import Schedule

Shown = tuple[Tensor | Outputs, Tensor | Outputs, Tensor]  # student's and teacher's outputs, target


class GuidedTraining:
    """What every host of a guided method does in an epoch: eq. (5) jointly, or Algorithm 1 of Kag et al. (ICLR 2023).

    Jointly, the host's optimizer trains student, method and guide. With a ``recipe``, the guide has its own optimizer,
    given here, and the host's trains student and method. The host provides batches and the models' outputs, and keeps
    what is its own: wrapping for several devices, clipping, averaging, files.

    Args:
        guided: method and guide, see ``disk_plugin.features.Guided``.
        epochs: number of epochs of the host, over which the schedules run; None for constants.
        recipe: of Algorithm 1's alternation; None to train guide and student jointly.
        guide_optimizer: with a recipe, the optimizer of the guide's parameters and no others.
        guide_rate: epoch, counted from 0 -> the guide's learning rate; None to leave the optimizer's.
        dual: keywords of ``DualScheduler``.
        schedule: given instead of ``epochs`` and ``dual``.
        report: makes the object that collects an epoch's means.
        seed: of the record's order and choice of samples.

    Raises:
        ValueError: a recipe without an optimizer, or the reverse; a schedule beside ``epochs`` or ``dual``.

    Examples:
        >>> import torch
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> from disk_plugin.features import DKD
        >>> training = GuidedTraining(Guided(DiSKLoss(GuideHead(10)), DKD()), epochs=1)
        >>> student_logits = torch.randn(4, 10, requires_grad=True)
        >>> optimizer = torch.optim.SGD([student_logits, *training.guided.trainable_parameters()], lr=0.1)
        >>> training.begin_epoch(0)
        >>> training.loss(student_logits, torch.randn(4, 10), torch.arange(4)).backward()
        >>> optimizer.step()
        >>> "usage" in training.end_epoch()
        True
    """

    def __init__(
        self,
        guided: Guided,
        *,
        epochs: int | None = None,
        recipe: Recipe | None = None,
        guide_optimizer: torch.optim.Optimizer | None = None,
        guide_rate: Callable[[int], float] | None = None,
        dual: Mapping[str, Any] | None = None,
        schedule: Schedule | None = None,
        report: Callable[[], EpochReport] = EpochReport,
        seed: int = 0,
    ) -> None:
        if (recipe is None) != (guide_optimizer is None):
            raise ValueError(
                f"Algorithm 1 needs recipe and guide_optimizer, joint training neither: got recipe={recipe!r}, "
                f"guide_optimizer={type(guide_optimizer).__name__}"
            )
        if schedule is not None and (epochs is not None or dual is not None):
            raise ValueError(f"schedule is given instead of epochs and dual, got epochs={epochs} and dual={dual} too")
        self.guided, self.disk, self.recipe = guided, guided.disk, recipe
        self.guide_passes: GuidePasses | None = None
        if recipe is not None and guide_optimizer is not None:
            self.guide_passes = GuidePasses(self.disk, recipe, guide_optimizer, rate=guide_rate, seed=seed)
        per_iteration = 1 if recipe is None else recipe.student_passes
        self.schedule = schedule or Schedule.spanning(self.disk, epochs, per_iteration, dual)
        self._new_report, self.report = report, report()

    @property
    def joint(self) -> bool:
        """Whether guide and student are trained by one optimizer, without a recipe."""
        return self.guide_passes is None

    def loss(
        self,
        student: Tensor | Outputs,
        teacher: Tensor | Outputs,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss for the host's optimizer; logits are enough for a method that reads nothing else."""
        evaluated = self.guided.evaluate(to_outputs(student), to_outputs(teacher), target)
        return self.descended(self.terms(*evaluated, sample_weight=sample_weight).mean())

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        teacher: Outputs,
        losses: Mapping[str, Tensor],
        *,
        guide_logits: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> GuidedTerms:
        """Weight the method's losses per sample; report them, and record the batch if that is due.

        For a host that evaluates the method, or the guide, inside a module of its own. Arguments are those of
        ``Guided.weigh``.
        """
        if guide_logits is None and not self.joint:  # without gradient, as its own passes train it
            with torch.no_grad():
                guide_logits = self.disk.guide_logits(teacher.logits, self.guided.features_of(teacher), target=target)
        terms = self.guided.weigh(
            logits, target, teacher, losses, guide_logits=guide_logits, sample_weight=sample_weight
        )
        if self.disk.training:
            self.report.add(terms)
            if self.guide_passes is not None:
                inputs = logits, teacher.logits, target, self.guided.features_of(teacher)
                self.guide_passes.record(self.schedule.epoch, *inputs, sample_weight=sample_weight)
        return terms

    def descended(self, means: GuidedTerms) -> Tensor:
        """Return the loss for the host's optimizer out of the terms' means."""
        return means.loss if self.joint else means.student_loss

    def begin_epoch(self, epoch: int) -> None:
        """Set schedule, method and report to an epoch, counted from 0; a resumed run may start at any."""
        self.report = self._new_report()
        self.schedule.begin(epoch)
        if self.guided.method is not None:
            self.guided.method.begin_epoch(epoch)
        if not self.joint:
            self.disk.guide.eval()

    def run_guide_passes(self, loader: Iterable[Any], show: Callable[[Any], Shown]) -> int:
        """Make Algorithm 1's guide passes before this epoch; return their number over the data.

        Args:
            loader: of the training data.
            show: batch -> (student's outputs, teacher's outputs, target), with the student in evaluation mode.
        """
        if self.guide_passes is None:
            return 0
        method = self.guided.method

        def guide_loss(batch: Any) -> Tensor:
            with torch.no_grad():
                student, teacher, target = show(batch)
                student, teacher = to_outputs(student), to_outputs(teacher)
                logits = student.logits if method is None else method.predict(student)
            features = self.guided.features_of(teacher)
            return self.disk.terms(logits, teacher.logits, target, features).guide_loss

        with nullcontext() if method is None else in_mode(method, training=False):
            return self.guide_passes.run(self.schedule.epoch, repeated(loader), guide_loss)

    def end_epoch(self) -> dict[str, float]:
        """Step the schedule; return the ended epoch's ``means()``."""
        means = self.means()
        self.schedule.end()
        if self.guide_passes is not None:
            self.guide_passes.run_replay(self.schedule.epoch)
        return means

    def means(self) -> dict[str, float]:
        """Return multiplier, budget, target and means over the samples of all ranks, and begin new means.

        ``end_epoch`` calls it; a host that stops within an epoch calls it alone.
        """
        means = {"multiplier": float(self.disk.multiplier), "budget": float(self.disk.budget)}
        means |= target_of(self.disk)
        self.report.sum_over_processes()
        means |= self.report.means()
        self.report = self._new_report()
        return means

    def restart_report(self) -> None:
        """Discard what the report has collected."""
        self.report = self._new_report()

    def share_between_processes(self) -> None:
        """Share the hinge between ranks and, for Algorithm 1, broadcast rank 0's guide."""
        self.disk.reduce_mean = mean_over_processes
        if self.guide_passes is not None:
            self.guide_passes.broadcast()

    @property
    def stateful(self) -> dict[str, Any]:
        """What a checkpoint holds beside the student, by name; the schedule after the loss, into which it writes."""
        parts: dict[str, Any] = {"disk": self.disk, "method": self.guided.method}
        parts |= {"dual": self.schedule.dual, "guide_passes": self.guide_passes}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each part: tensors, numbers and containers of them."""
        return {name: part.state_dict() for name, part in self.stateful.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of each part.

        Raises:
            RuntimeError: a state with other parts, as of another mode or method, or without a schedule.
        """
        check_parts(state, self.stateful)
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])


def check_parts(state: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raise RuntimeError unless a state holds these parts."""
    if set(state) != set(expected):
        raise RuntimeError(
            f"the checkpoint must hold {sorted(expected)}, got {sorted(state)}: the run was joint and is now "
            f"alternating or the reverse, or only one of the two has schedules"
        )
