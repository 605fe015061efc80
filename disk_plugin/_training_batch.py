"""What a training batch changes in a loss: statistics, a fitted temperature, the one g of a ``UniformGuide``."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks
from ._state import write
from .epoch_statistics import count_batch, is_finite
from .functional import DiSKTerms, student_temperature_step
from .functional.slope import discount_slope

if TYPE_CHECKING:
    from .loss import DiSKLoss


@torch.no_grad()
def step_student_temperature(disk: "DiSKLoss", student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> None:
    """Make one Newton step towards the fitted student temperature, in place."""
    _checks.target(target, student_logits)
    temperature, moments = student_temperature_step(
        student_logits,
        teacher_logits,
        disk.student_temperature_moments,
        disk.fitted_student_temperature,
        temperature=disk.temperature,
        valid=None if target.is_floating_point() else target != disk.ignore_index,
    )
    pairs = ((disk.fitted_student_temperature, temperature), (disk.student_temperature_moments, moments))
    if not all(write(*pair) for pair in pairs):
        raise RuntimeError(
            'student_temperature="fit" moves a buffer in training mode, which this transform of torch.func does not '
            "allow: call disk.eval(), which uses the temperature as it is, or pass the buffers to "
            "torch.func.functional_call"
        )


def observe(
    disk: "DiSKLoss",
    terms: DiSKTerms,
    guide_logits: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
) -> None:
    """Count the batch and show it to a guide that follows the discount."""
    # where torch.func does not allow it nothing is written: values and gradients need no statistics
    statistics = count_batch(disk.epoch_statistics, terms, target, guide_logits, disk.ignore_index)
    write(disk.epoch_statistics, statistics)
    finite = is_finite(terms)
    write(disk.epoch_batches, disk.epoch_batches + torch.stack([torch.ones_like(finite), ~finite]))
    if getattr(disk.guide, "follows_discount", False):
        _step_guide(disk, terms.mean(), student_logits, teacher_logits, target)


@torch.no_grad()
def _step_guide(
    disk: "DiSKLoss", terms: DiSKTerms, student_logits: Tensor, teacher_logits: Tensor, target: Tensor
) -> None:
    """Show a ``UniformGuide`` what the batch gave, the whole one where ``reduce_mean`` looks further."""
    guide: Any = disk.guide
    slope = discount_slope(
        student_logits,
        teacher_logits,
        target,
        guide.log_guide,
        temperature=disk.temperature,
        student_temperature=disk.student_temperature,
        top_k=disk.top_k,
        variant=disk.variant,
        ignore_index=disk.ignore_index,
    )
    seen = torch.stack([terms.discount, slope, terms.agreement, torch.ones_like(slope)]) * terms.counted
    seen = seen if disk.reduce_mean is None else disk.reduce_mean(seen)
    guide.step(*(seen[:3] / seen[3]))  # NaN, which moves nothing, where no position counted
