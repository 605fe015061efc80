"""The buffers of a loss that a training batch updates: statistics, a fitted temperature, the level of g."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _checks
from ._form import level_of
from ._state import write
from ._watch import warn_if_probabilities, warn_if_swapped, warn_without_scheduler
from .epoch_statistics import count_batch, is_finite
from .functional import DiSKTerms, student_temperature_step
from .functional.objective import evaluate
from .level import DiscountLevel

if TYPE_CHECKING:
    from .loss import DiSKLoss


def evaluate_batch(
    disk: "DiSKLoss",
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    own_logits: Tensor,
    sample_weight: Tensor | None,
    *,
    per_position: bool = False,
    counted: bool,
) -> DiSKTerms:
    """Evaluate the terms for the guide's own logits; with ``counted`` the batch also updates the loss's buffers.

    Micro-batches pass False: their full batch is counted later, once, and only then averaged over ranks. Nor is a batch
    counted under ``torch.no_grad``, as nothing is trained on it.
    """
    counted = counted and torch.is_grad_enabled()
    guide_logits = disk.level.place(own_logits) if disk.level else own_logits
    if counted:
        _check_first_time(disk)
    if counted and disk.fit_student_temperature:
        step_student_temperature(disk, student_logits, teacher_logits, target)
    settings = disk._settings(averaged=counted)
    inputs = student_logits, teacher_logits, target, guide_logits
    terms = evaluate(*inputs, settings, sample_weight, per_position=per_position)
    if counted:
        warn_if_swapped(disk, student_logits, teacher_logits)
        warn_if_probabilities(disk, student_logits=student_logits, teacher_logits=teacher_logits)
        observe(disk, terms, guide_logits, own_logits, target)
    return terms


def _check_first_time(disk: "DiSKLoss") -> None:
    """Raise RuntimeError inside a backward, where activation checkpointing evaluates a batch a second time."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return
    level = level_of(disk)
    if disk.fit_student_temperature or (level is not None and level.discount is not None):
        raise RuntimeError(
            "the loss was evaluated within a backward, as by torch.utils.checkpoint: since its first evaluation the "
            "level of g, or the fitted temperature, has moved, and the gradient would be that of another loss; call "
            "the loss outside the checkpoint"
        )


@torch.no_grad()
def step_student_temperature(disk: "DiSKLoss", student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> None:
    """Make one Newton step of the fitted student temperature, in place; ``reduce_mean`` averages it over the ranks."""
    _checks.target(target, student_logits)
    temperature, moments = student_temperature_step(
        student_logits,
        teacher_logits,
        disk.student_temperature_moments,
        disk.fitted_student_temperature,
        temperature=disk.temperature,
        valid=None if target.is_floating_point() else target != disk.ignore_index,
    )
    if disk.reduce_mean is not None:
        stepped = disk.reduce_mean(torch.cat([temperature.unsqueeze(0), moments]))
        temperature, moments = stepped[0], stepped[1:]
    pairs = ((disk.fitted_student_temperature, temperature), (disk.student_temperature_moments, moments))
    if not all(write(*pair) for pair in pairs):
        raise RuntimeError(
            'student_temperature="fit" updates a buffer in training mode, which this transform of torch.func does not '
            "allow: call disk.eval(), which uses the temperature as it is, or pass the buffers to "
            "torch.func.functional_call"
        )


def observe(disk: "DiSKLoss", terms: DiSKTerms, guide_logits: Tensor, own_logits: Tensor, target: Tensor) -> None:
    """Update the statistics and the level of g, the loss's or a ``UniformGuide``'s, with a batch.

    ``guide_logits`` are those used in the loss, ``own_logits`` the guide's output.
    """
    # not written where torch.func does not allow it: values and gradients do not depend on the statistics
    statistics = count_batch(disk.epoch_statistics, terms, target, guide_logits, disk.ignore_index)
    write(disk.epoch_statistics, statistics)
    finite = is_finite(terms)
    write(disk.epoch_batches, disk.epoch_batches + torch.stack([torch.ones_like(finite), ~finite]))
    level = level_of(disk)
    if level is None:
        return
    warn_without_scheduler(level)
    if level.discount is not None:
        _step_level(disk, level, terms.mean(), own_logits, target)


@torch.no_grad()
def _step_level(disk: "DiSKLoss", level: DiscountLevel, terms: DiSKTerms, own_logits: Tensor, target: Tensor) -> None:
    """Step the level with the batch's means; ``reduce_mean`` averages them over the ranks."""
    one = torch.ones_like(terms.discount)
    shown = own_logits.detach().to(one.dtype)
    if not target.is_floating_point():
        shown = torch.where(target != disk.ignore_index, shown, 0.0)
    means = torch.stack([terms.discount, terms.discount_slope, terms.reach, terms.agreement, one])
    seen = torch.cat([means * terms.counted, shown.sum().unsqueeze(0)])
    seen = seen if disk.reduce_mean is None else disk.reduce_mean(seen)
    discount, slope, reach, agreement, counted, centre = seen.unbind()
    # NaN, which changes nothing, if all targets are ignored
    level.step(discount / reach, slope / reach, agreement / counted, centre / counted)
