"""Train many random starts of a tiny student as one batch: cross-entropy, distillation, one g for all, or DiSK.

A row's settings select the method: with ``guide`` it is Algorithm 1, with ``ramp`` the scaffold under one g without a
network, otherwise KD, which at ``ce_weight`` 1 is cross-entropy.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import functional

from .guides import Guides
from .starts import Problem, Starts, step

PASSES = 3  # "We replace the arg min in the Algorithm 1 with three SGD steps over the entire dataset", A.5


class Trained(NamedTuple):
    """The students; their parameters after each iteration (R + 1, S, P); the guides' g at the end (S, N), or None."""

    students: Starts
    path: Tensor
    guide: Tensor | None = None


def train(
    make_student: Callable[[], nn.Module],
    problem: Problem,
    settings: dict[str, Any],
    *,
    starts: int,
    iterations: int,
    seed: int,
    batch_size: int | None = None,
    bounds: tuple[float, float] | None = None,
) -> Trained:
    """Train ``starts`` students for ``iterations`` times three passes over the data each.

    Args:
        make_student: builds a student from torch's global random state.
        problem: the training data.
        settings: ce_weight, temperature, student_temperature; top_k with a scaffold; ``ramp`` = [period, over]: g falls
            linearly from 1 to 0 over this share of each period; ``guide`` and further settings of :class:`Guides`;
            ``loss_scale`` multiplies the student's loss, ``steps`` are the shares of training after which its learning
            rate is divided by ten.
        starts: S.
        iterations: R of Algorithm 1.
        seed: of the starts and of the order of samples: the same for every method.
        batch_size: samples of a gradient step, None for all.
        bounds: to which every student's parameters are clamped after each step.
    """
    torch.manual_seed(seed)
    students = Starts([make_student() for _ in range(starts)])
    optimizer, scale = students.sgd(), settings.get("loss_scale", 1.0)
    milestones = [round(share * iterations) for share in settings.get("steps", ())]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    batches = batches_of(problem, batch_size, seed)
    steps = PASSES * -(-len(problem.y) // (batch_size or len(problem.y)))
    guides = Guides(problem, settings, starts, iterations) if "guide" in settings else None
    path = [students.flat()]
    for iteration in range(iterations):
        if guides:
            guides.train(students, batches, steps)
        g = ramped(settings["ramp"], iteration) if "ramp" in settings else 0.0
        for _ in range(steps):
            batch = next(batches)
            logits = students(batch.x, in_dims=None)
            loss = guides.student_loss(logits, batch) if guides else _loss(logits, batch, settings, g)
            step(optimizer, scale * loss)
            if bounds:
                students.clamp(*bounds)
        schedule.step()
        path.append(students.flat())
    return Trained(students, torch.stack(path), guides.values(problem) if guides else None)


def ramped(ramp: tuple[int, float], iteration: int) -> float:
    """Return the g of an iteration: linear from 1 to 0 over a share of each period, then 0."""
    period, over = ramp
    return max(0.0, 1 - (iteration % period) / (over * period))


def student_loss(logits: Tensor, problem: Problem, settings: dict[str, Any], guide: Tensor | None) -> Tensor:
    """Return one student's loss at these logits: KD's, or DiSK's with the guide's values (N,) fixed."""
    weight = settings["ce_weight"]
    temperatures = {key: settings[key] for key in ("temperature", "student_temperature") if key in settings}
    if guide is None:
        weights = {"ce_weight": weight, "distill_weight": 1 - weight}
        return functional.kd_loss(logits, problem.teacher_logits, problem.y, **weights, **temperatures)
    scaffold = functional.scaffolded_kl(
        logits, problem.teacher_logits, guide.logit(), top_k=settings["top_k"], **temperatures
    )
    return weight * F.cross_entropy(logits, problem.y) + (1 - weight) * scaffold


def _loss(logits: Tensor, batch: Problem, settings: dict[str, Any], g: float) -> Tensor:
    """Sum the losses (S,) of students that share one g; logits (S, N, C) are passed on as dense (S, C, N)."""
    starts = len(logits)
    dense = batch._replace(y=batch.y.expand(starts, -1), teacher_logits=batch.teacher_logits.T.expand(starts, -1, -1))
    guide = torch.full((starts, len(batch.y)), g) if g else None
    return starts * student_loss(logits.transpose(1, 2), dense, settings, guide)


def batches_of(problem: Problem, batch_size: int | None, seed: int) -> Iterator[Problem]:
    """Yield batches forever, reshuffled each epoch; all samples at once if batch_size is None."""
    generator = torch.Generator().manual_seed(seed)
    while batch_size is None:
        yield problem
    while True:
        for index in torch.randperm(len(problem.y), generator=generator).split(batch_size):
            yield Problem(*(part[index] for part in problem))
