"""Training of the students: same start, batches and optimizer; methods differ only in the loss."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.functional import DiSKTerms
from disk_plugin.uniform import UniformGuide

from .problems import Problem, accuracy, mlp

LEARNING_RATE, MOMENTUM = 0.1, 0.9  # with a cosine: the paper's recipe


class Scores(NamedTuple):
    """Accuracies on each split at the end of training, percent."""

    train: float
    validation: float
    test: float


def new_student(problem: Problem, seed: int) -> nn.Sequential:
    """Return an untrained student."""
    torch.manual_seed(seed)
    return mlp(problem.widths, problem.activation)


def batches(problem: Problem, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield positions, in an order that depends only on seed and epoch."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    yield from torch.randperm(len(problem.train.y), generator=generator).split(problem.batch_size)


def warm_student(problem: Problem, seed: int, passes: int) -> nn.Sequential:
    """Train a student with cross-entropy."""
    student = new_student(problem, seed)
    x, y = problem.train
    _fit(problem, student, [], lambda index: F.cross_entropy(student(x[index]), y[index]), seed, passes)
    return student


class NormalizedGuide(DiSKLoss):
    """The default form whose guide also minimizes log(1 + K g), with which s + g would be a proper distribution."""

    def terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *inputs: Any, **options: Any
    ) -> DiSKTerms:
        """Add the normalizer's gradient w.r.t. the guide; no value changes."""
        logits = self.level.place(self.guide_logits(teacher_logits, *inputs))  # before this batch moves the level
        scaled = teacher_logits.shape[1] * logits.detach().sigmoid()
        slope = scaled * (1 - logits.detach().sigmoid()) / (1 + scaled)
        # as in the guide's own objective the mean is 0: the discount sets the level of g
        added = ((slope - slope.mean()) * (logits - logits.detach())).mean()
        found = super().terms(student_logits, teacher_logits, target, *inputs, **options)
        return found._replace(loss=found.loss + added)


def make_disk(problem: Problem, settings: dict[str, Any]) -> DiSKLoss:
    """Return README's loss.

    ``settings`` are those of ``DiSKLoss``, plus ``uniform``: the arguments of a ``UniformGuide`` instead of a guide;
    ``normalized``: a guide whose objective has the normalizer; and ``share``, ``over`` and ``patience`` of the
    ``"auto"`` target.
    """
    settings = dict(settings)
    kind = NormalizedGuide if settings.pop("normalized", False) else DiSKLoss
    uniform = settings.pop("uniform", None)
    target = {name: settings.pop(name) for name in ("share", "over", "patience") if name in settings}
    if uniform is None:
        disk = kind(GuideHead(problem.widths[-1], problem.teacher_features.shape[1]), **settings)
    else:
        disk = DiSKLoss(UniformGuide(**uniform), **settings)
    for name, value in target.items():
        setattr(disk.level or disk.guide, name, value)
    return disk


def train_disk(problem: Problem, start: nn.Sequential, settings: dict[str, Any], seed: int, passes: int) -> Scores:
    """Return the scores of :func:`disk_student`."""
    return _scores(problem, disk_student(problem, start, settings, seed, passes))


def disk_student(
    problem: Problem, start: nn.Sequential, settings: dict[str, Any], seed: int, passes: int
) -> nn.Sequential:
    """Train a student by README's loop; ``settings`` as in :func:`make_disk`, and ``dual`` for ``DualScheduler``."""
    student, settings = copy.deepcopy(start), dict(settings)
    dual_settings = settings.pop("dual", {})
    torch.manual_seed(seed)
    disk = make_disk(problem, settings)
    dual = DualScheduler(disk, epochs=passes, **dual_settings)
    x, y = problem.train

    def loss_of(index: Tensor) -> Tensor:
        return disk(student(x[index]), problem.teacher_logits[index], y[index], problem.teacher_features[index])

    _fit(problem, student, [*disk.parameters()], loss_of, seed, passes, dual.step)
    return student


def train_kd(
    problem: Problem, start: nn.Sequential, trials: list[dict[str, float]], seed: int, passes: int
) -> list[Scores]:
    """Return the scores of :func:`kd_students`, one per trial."""
    students = kd_students(problem, start, trials, seed, passes)
    with torch.no_grad():
        shown = [(students(x), y) for x, y in (problem.train, problem.validation, problem.test)]
    return [Scores(*(accuracy(logits[row], y) for logits, y in shown)) for row in range(len(trials))]


def kd_students(
    problem: Problem, start: nn.Sequential, trials: list[dict[str, float]], seed: int, passes: int
) -> nn.Module:
    """Train a student per trial (``ce_weight``, ``temperature``), all stacked: (N, D) -> (trials, N, C)."""
    students = _Stack(start, len(trials))
    weight, tau = (torch.tensor([trial[name] for trial in trials]) for name in ("ce_weight", "temperature"))
    tau = tau.view(-1, 1, 1)
    x, y = problem.train

    def loss_of(index: Tensor) -> Tensor:
        logits = students(x[index])
        target = problem.teacher_logits[index] / tau
        kl = F.kl_div((logits / tau).log_softmax(2), target.log_softmax(2), reduction="none", log_target=True)
        labels = y[index].expand(len(trials), -1)
        ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)
        return (weight * ce + (1 - weight) * (tau.flatten() ** 2) * kl.sum(2).mean(1)).sum()

    _fit(problem, students, [], loss_of, seed, passes)
    return students


class _Stack(nn.Module):
    """Copies of a student, trained jointly: (N, D) -> (T, N, C)."""

    def __init__(self, start: nn.Sequential, copies: int) -> None:
        super().__init__()
        linear = [layer for layer in start if isinstance(layer, nn.Linear)]
        self.activation = next((layer for layer in start if not isinstance(layer, nn.Linear)), nn.Identity())
        self.weights = nn.ParameterList([layer.weight.detach().T.repeat(copies, 1, 1) for layer in linear])
        self.biases = nn.ParameterList([layer.bias.detach().repeat(copies, 1, 1) for layer in linear])

    def forward(self, x: Tensor) -> Tensor:
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (self.activation(x) if depth else x) @ weight + bias
        return x


def _fit(
    problem: Problem,
    student: nn.Module,
    more: list[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    seed: int,
    passes: int,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    optimizer = torch.optim.SGD([*student.parameters(), *more], lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes)
    for epoch in range(passes):
        for index in batches(problem, seed, epoch):
            loss = loss_of(index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        after_epoch()


@torch.no_grad()
def _scores(problem: Problem, student: nn.Module) -> Scores:
    return Scores(*(accuracy(student(x), y) for x, y in (problem.train, problem.validation, problem.test)))
