"""Statistics of an epoch's training batches for the scheduler, collected on the device and read once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import DiSKTerms

# The collected tensor: sums over targets of usage, 1, g, g squared and discount, then the smallest and the largest g.
NOTHING_SEEN = (0.0,) * 5 + (torch.inf, -torch.inf)
_BEFORE = 4  # its length until 0.1: usage, positions, smallest, largest


class EpochStatistics(NamedTuple):
    """Python floats over the non-ignored targets since the last reset, of batches with a finite loss.

    Attributes:
        usage: mean g * CE, nats per sample; NaN without a batch.
        positions: number of non-ignored targets.
        guide_min: smallest g; inf without a batch.
        guide_max: largest g; -inf without a batch.
        guide_std: standard deviation of g; NaN without a batch.
        discount: mean discount; NaN without a batch.
    """

    usage: float
    positions: float
    guide_min: float
    guide_max: float
    guide_std: float
    discount: float

    @classmethod
    def read(cls, collected: Tensor) -> "EpochStatistics":
        """Convert the collected tensor to Python floats; synchronizes with the device."""
        usage, positions, total, squares, discount, smallest, largest = collected.tolist()
        count = positions or float("nan")
        variance = squares / count - (total / count) ** 2
        spread = variance if variance != variance else max(variance, 0.0) ** 0.5  # NaN stays NaN
        return cls(usage / count, positions, smallest, largest, spread, discount / count)


def no_statistics() -> Tensor:
    """Return the collected tensor before the first batch."""
    return torch.tensor(NOTHING_SEEN, dtype=torch.float64)


def upgrade(state_dict: dict[str, Any], name: str) -> None:
    """Convert an older checkpoint's entry to the current layout; unknown values are NaN, which triggers no warning.

    A tensor of any other shape stays, so that ``load_state_dict`` raises.
    """
    if name not in state_dict or tuple(state_dict[name].shape) != (_BEFORE,):
        return
    usage, positions, smallest, largest = state_dict[name].tolist()
    unknown = float("nan") if positions else 0.0
    values = [usage, positions, unknown, unknown, unknown, smallest, largest]
    state_dict[name] = torch.tensor(values, dtype=torch.float64, device=state_dict[name].device)


@torch.no_grad()
def count_batch(collected: Tensor, terms: DiSKTerms, target: Tensor, guide_logits: Tensor, ignore_index: int) -> Tensor:
    """Return the statistics with a batch added, without synchronizing with the device."""
    if not guide_logits.numel():
        return collected
    dtype = collected.dtype
    valid = torch.ones_like(guide_logits, dtype=torch.bool)
    if not target.is_floating_point():
        valid = target != ignore_index
    positions = valid.sum().to(dtype)
    # a mean or values per target: either way this is the sum over targets
    usage, discount = (
        value.to(dtype) * positions if value.ndim == 0 else value.sum(dtype=dtype)
        for value in (terms.usage, terms.discount)
    )
    # a batch that overflowed must not spoil the epoch's statistics
    finite = is_finite(terms)
    g = guide_logits.to(dtype).sigmoid()
    shown = torch.where(valid & finite, g, 0.0)
    sums = torch.where(finite, torch.stack([usage, positions, shown.sum(), shown.square().sum(), discount]), 0.0)
    smallest = torch.minimum(collected[5], torch.where(valid & finite, g, torch.inf).amin())
    largest = torch.maximum(collected[6], torch.where(valid & finite, g, -torch.inf).amax())
    return torch.cat([collected[:5] + sums, torch.stack([smallest, largest])])


@torch.no_grad()
def is_finite(terms: DiSKTerms) -> Tensor:
    """Whether a batch's loss and usage are finite, a bool scalar."""
    return (terms.loss.sum() + terms.usage.sum()).isfinite()
