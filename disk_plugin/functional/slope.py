"""How the mean discount answers to one g for all samples: what sets that g by Newton's method."""

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..variants import Variant
from ._positions import as_dtype, by_position, positions_of, promote, without_ignored
from .blocks import softened_teacher, with_guide
from .scaffold import mask_or_none

_SAMPLES, _POSITIONS = 16, 256  # about; enough, as the slope sets the size of a step


@torch.no_grad()
def discount_slope(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    log_guide: Tensor,
    *,
    temperature: float,
    student_temperature: float | Tensor,
    top_k: int | None,
    variant: Variant,
    ignore_index: int,
) -> Tensor:
    r"""Return the mean of d discount / d log g = sum_k t_k s_k g / (s_k + g)^2 / sum_y t_y over some samples, a scalar.

    Args are those of ``disk_terms``; ``log_guide`` is log g, a scalar.
    """
    some = _some(student_logits)
    s, t = promote(student_logits[some], teacher_logits[some])
    where = positions_of(
        s, target[some if target.is_floating_point() else (some[0], *some[2:])], ignore_index=ignore_index
    )
    s, t = (by_position(without_ignored(value, where.masked)) for value in (s, t))
    mask = mask_or_none(t, top_k, where.label.flatten() if variant.scaffold_label else None)
    _, target_t = softened_teacher(t, mask, temperature, variant.teacher_target == "scaffolded")
    log_s = log_softmax(s / as_dtype(student_temperature, s.dtype), 1)
    _, share, kept = with_guide(log_s, log_guide.to(s.dtype).expand(len(s), 1), mask)
    mass = target_t.sum(1).clamp(min=torch.finfo(s.dtype).tiny)
    slopes = ((target_t * share * kept).sum(1) / mass).reshape(where.label.shape)
    return where.reduce(where.plain(slopes), "mean")


def _some(logits: Tensor) -> tuple[slice, ...]:
    """Return slices of (N, C, d1, ...) that leave some positions, spread over the batch and over each sample."""
    count, _, *positions = logits.shape
    kept = _SAMPLES if positions else _POSITIONS
    each = math.prod(positions) * min(count, kept) / _POSITIONS
    stride = max(math.ceil(each ** (1 / len(positions))), 1) if positions and each > 0 else 1
    return (
        slice(None, None, max(math.ceil(count / kept), 1)),
        slice(None),
        *[slice(None, None, stride)] * len(positions),
    )
