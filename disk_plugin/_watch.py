"""Warnings given once: a dead guide, a NaN loss, a schedule that hardly rises or is past its end.

Also student and teacher swapped in a call, which would silently train the guide alone.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .epoch_statistics import EpochStatistics
from .functional._positions import transformed
from .level import DiscountLevel

# A guide is dead if it no longer tells samples apart: g > .99 or < .01 on every sample, or, as the loss keeps g below
# 1, equal g on all of them while g or the discount is nearly 1. With many classes g < .01 may still be useful.
_BELOW, _ABOVE, _SPREAD, _NEAR_ONE, _ALL_TAKEN, _NOTHING_TAKEN = 0.01, 0.99, 0.002, 0.9, 0.95, 0.01


def dead_guide(seen: EpochStatistics, epoch: int, *, pulled_down: bool) -> str | None:
    """Return a warning if an epoch's training batches show a dead guide.

    ``pulled_down``: whether the multiplier was large enough for its range to lower g. While it is small, g near 1 on
    all samples is the optimum of eq. (5), from which a live guide recovers.
    """
    alike = seen.guide_std < _SPREAD and (seen.guide_min > _NEAR_ONE or seen.discount > _ALL_TAKEN)
    signs = {
        f"g > {_ABOVE} on every sample": seen.guide_min > _ABOVE,
        f"g < {_BELOW} on every sample": seen.guide_max < _BELOW and seen.discount <= _NOTHING_TAKEN,
        "g is alike on all samples": alike and pulled_down,
    }
    sign = next((sign for sign, shown in signs.items() if shown), None)
    if sign is None or not seen.positions:
        return None
    return (
        f"the guide is dead: {sign} of epoch {epoch} (smallest {seen.guide_min:.3g}, largest {seen.guide_max:.3g}, "
        f"standard deviation {seen.guide_std:.2g}; {seen.discount:.3g} of the teacher's pull taken off). It no longer "
        f"tells samples apart and may never recover; lower guide_gradient_scale or the guide's learning rate, or raise "
        f"or narrow multiplier"
    )


def not_finite(batches: float, bad: float, epoch: int) -> str | None:
    """Return a warning if half of an epoch's batches had a NaN or inf loss; a loss scaler skips a few."""
    if not bad or bad < batches / 2:
        return None
    return (
        f"the loss was NaN or inf in {bad:.0f} of the {batches:.0f} batches of epoch {epoch}: look at the student's "
        f"and the teacher's logits, the learning rate and the loss scaler"
    )


def low_multiplier(highest: float, upper: float, epochs: int) -> str | None:
    """Return a warning if the multiplier hardly rises, as the cosine of a short run restarts too early."""
    if 3 * highest >= upper:  # a period of two epochs reaches half
        return None
    longer = f"period={epochs} lets it rise through the whole run, " if epochs > 2 else ""
    return (
        f"in the {epochs} steps of its schedule the multiplier comes to at most {highest:.3g} of {upper:g}, so that "
        f"the budget is hardly enforced: {longer}multiplier=({upper:g}, {upper:g}) keeps it constant"
    )


def constant_budget(high: float, low: float, period: int) -> str | None:
    """Return a warning if a budget that is to fall stays at its upper end, as its cosine restarts every epoch."""
    if high == low or period > 1:
        return None
    return (
        f"the budget stays at {high:g} and never falls to {low:g}: its cosine restarts every epoch; give as "
        f"budget_period the epochs that it is to take"
    )


def single_step(level: DiscountLevel, epochs: int) -> str | None:
    """Return a warning if the schedule ends before what follows the training progress has left its start."""
    if epochs > 1 or not level.follows_progress:
        return None
    what = "discount='auto' is plain distillation" if level.discount == "auto" else "g stays at the first value"
    return (
        f"in a schedule of epochs=1 training ends at progress 0, where {what}: call step() several times within the "
        f"epoch and give that number as epochs, or set a constant"
    )


def unreachable(level: DiscountLevel | None, seen: EpochStatistics) -> str | None:
    """Return a warning if g is at its largest and the discount still below its target."""
    if level is None or level.discount is None or not seen.positions or level.log_guide.item() < -1e-3:
        return None
    return (
        f"g is 1, its largest, and the mean discount is {seen.discount:.3g} of the teacher's pull, still below its "
        f"target of {level.target.item():.3g} of what g can take off: give a smaller discount"
    )


def past_the_end(epoch: int, epochs: int) -> str | None:
    """Return a warning if the schedule is over; stepped once per batch, it is over within the first epoch."""
    if epoch < epochs:
        return None
    return (
        f"step() was called {epoch + 1} times, the schedule has epochs={epochs}: call it once per epoch, not once per "
        f"batch, not at all beside Distiller(steps_per_epoch=...), and give DualScheduler the epochs of the whole run; "
        f"it stays at its end from here on"
    )


def restarted(level: DiscountLevel | None, progress: float) -> str | None:
    """Return a warning if a loss was loaded without the state of its scheduler, which begins again."""
    if level is None or not level.follows_progress:
        return None
    loaded = level.rewound_from
    if not progress < loaded < 1:  # from the end of a run a new one may begin
        return None
    return (
        f"the loss comes from training progress {loaded:.3g}, and its DualScheduler goes on from {progress:.3g}: to "
        f"resume, give dual.load_state_dict what dual.state_dict() returned; for a new run, build a new DiSKLoss"
    )


_UNHEARD = 100  # batches without a scheduler; fewer may be a first try of the loss
_UNSTEPPED = 10_000  # batches since its last step; fewer may be a long epoch


@contextmanager
def ignoring_note() -> Iterator[None]:
    """Suppress the warning at construction for a host that writes ``DualScheduler.note`` to its own log."""
    starts = ("in the .* steps of its schedule", "the budget stays at", "in a schedule of epochs=1")
    with warnings.catch_warnings():
        for start in starts:
            warnings.filterwarnings("ignore", start, UserWarning)
        yield


@contextmanager
def ignoring_past_the_end() -> Iterator[None]:
    """Suppress the warning for a host that calls ``step()`` once per epoch beyond a shorter schedule."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"step\(\) was called .* times, the schedule has epochs=", UserWarning)
        yield


def warn_if_swapped(
    module: Any, student: Tensor, teacher: Tensor, names: tuple[str, str] = ("student_logits", "teacher_logits")
) -> None:
    """Warn once per module, in training mode, if the teacher's output requires grad and the student's does not."""
    # torch.compile does not trace warnings; inside a transform requires_grad is not that of the caller's tensors
    if torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled():
        return
    if not module.training or student.requires_grad or not teacher.requires_grad or "swapped" in module.warned:
        return
    module.warned.add("swapped")
    warnings.warn(
        f"{names[1]} requires grad and {names[0]} does not: are they swapped? The student's come first, and nothing "
        f"trains the teacher; if they are in order, run the teacher under torch.no_grad()",
        stacklevel=_first_outside(),
    )


def note_student(module: Any, student: Any) -> None:
    """Note whether a forward in training mode reaches the student, where that can be told: not compiled."""
    if torch.compiler.is_compiling() or transformed() or not module.training or not torch.is_grad_enabled():
        return
    if isinstance(student, Tensor):
        module.student_seen |= {"trained" if student.requires_grad else "frozen"}


def warn_without_ce(settings: Any) -> None:
    """Warn if settings of the cross-entropy are given to a loss that has none."""
    given = ["weight"] * (settings.weight is not None) + ["label_smoothing"] * bool(settings.label_smoothing)
    if given and not settings.ce_weight:
        warnings.warn(
            f"{' and '.join(given)} would change the cross-entropy alone, whose weight is 0: give ce_weight > 0, or "
            f"sample_weight in each call",
            stacklevel=_first_outside(),
        )


def warn_if_probabilities(module: Any, **given: Tensor) -> None:
    """Warn at the first training batch if rows look like the output of a softmax; that batch synchronizes."""
    if torch.compiler.is_compiling() or transformed() or not module.training or "probabilities" in module.warned:
        return
    if any(value.is_cuda for value in given.values()) and torch.cuda.is_current_stream_capturing():
        return
    module.warned.add("probabilities")
    found = [name for name, value in given.items() if not value.is_meta and _are_probabilities(value.detach())]
    if found:
        warnings.warn(
            f"{' and '.join(found)} must be logits, got rows of positive numbers that sum to 1: give what comes before "
            f"the softmax",
            stacklevel=_first_outside(),
        )


def _are_probabilities(value: Tensor) -> bool:
    near_one = (value.float().sum(1) - 1).abs() < 1e-2 if value.dtype.itemsize < 4 else (value.sum(1) - 1).abs() < 1e-4
    return value.numel() > 0 and bool((value > 0).all() & near_one.all())


def warn_without_scheduler(level: Any) -> None:
    """Warn once if a target or ramp depends on training progress and ``set_progress`` is not called, or no longer."""
    if torch.compiler.is_compiling() or transformed() or not level.follows_progress:
        return
    level.batches_without_progress += 1
    if level.has_scheduler and level.batches_without_progress == _UNSTEPPED and not level.warned_unstepped:
        level.warned_unstepped = True
        warnings.warn(
            f"{_UNSTEPPED} training batches since DualScheduler was made or stepped: call dual.step() after each "
            f"epoch, or what it schedules stays where it is (an epoch may be that long; then all is well)",
            stacklevel=_first_outside(),
        )
    if not level.has_scheduler and level.batches_without_progress == _UNHEARD:
        warnings.warn(
            f"{_UNHEARD} training batches without a DualScheduler: until one says how far training has come, nothing "
            f"moves from its start, and discount='auto' is plain distillation; make dual = DualScheduler(disk, "
            f"epochs=...) and call dual.step() once per epoch",
            stacklevel=_first_outside(),
        )


def _first_outside() -> int:
    """Return the ``stacklevel`` of the user's line for ``warnings.warn`` in the calling function."""
    inside = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level
