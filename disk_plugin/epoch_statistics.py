"""What an epoch's training batches showed, collected on the device and read once: the scheduler's evidence."""

from typing import NamedTuple

import torch
from torch import Tensor

from .functional import DiSKTerms


class EpochStatistics(NamedTuple):
    """Python floats over all positions since the last reset that were not ignored."""

    usage: float  # mean g * CE, nats per sample; NaN without a batch
    positions: float  # how many positions that is the mean of
    guide_min: float  # smallest g; inf without a batch
    guide_max: float  # largest g; -inf without a batch

    @classmethod
    def read(cls, collected: Tensor) -> "EpochStatistics":
        """Wait for the device and turn the collected tensor into numbers."""
        usage, positions, smallest, largest = collected.tolist()
        return cls(usage / positions if positions else float("nan"), positions, smallest, largest)


def no_statistics() -> Tensor:
    """Sum of usage over positions, number of positions, smallest g, largest g."""
    return torch.tensor([0.0, 0.0, torch.inf, -torch.inf], dtype=torch.float64)


@torch.no_grad()
def count_batch(collected: Tensor, terms: DiSKTerms, target: Tensor, guide_logits: Tensor, ignore_index: int) -> Tensor:
    """Return the statistics with a batch added, without waiting for the device."""
    if not guide_logits.numel():
        return collected
    valid = torch.ones_like(guide_logits, dtype=torch.bool)
    if not target.is_floating_point():
        valid = target != ignore_index
    positions = valid.sum().to(collected.dtype)
    # a mean, or the parts of one: either way its mean over positions times their number is the sum
    usage = terms.usage.to(collected.dtype)
    usage = usage * positions if usage.ndim == 0 else usage.sum()
    g = guide_logits.to(collected.dtype).sigmoid()
    updated = torch.stack(
        [
            collected[0] + usage,
            collected[1] + positions,
            torch.minimum(collected[2], torch.where(valid, g, torch.inf).amin()),
            torch.maximum(collected[3], torch.where(valid, g, -torch.inf).amax()),
        ]
    )
    # a batch that overflowed has a NaN loss already; it must not cost the whole epoch's statistics
    return torch.where(usage.isfinite(), updated, collected)
