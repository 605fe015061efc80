"""Which positions count, with what label and weight, and how a per-position value becomes a mean."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .. import _checks

Reduction = Literal["mean", "none"]


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring half types to float32 and mixed types to the wider one; float64 stays float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def as_dtype(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Cast a scalar tensor: a float64 one would promote a float32 loss, which is a scalar too.

    Always a copy: the graph must not hold a buffer that the next batch or the scheduler changes in place.
    """
    return value.detach().to(dtype, copy=True) if isinstance(value, Tensor) else value


class Positions(NamedTuple):
    """Labels and weights of the positions of one batch; every field but ``total`` is (N, d1, ...)."""

    label: Tensor  # int64; 0 where ignored, so that it can be gathered with
    valid: Tensor  # bool
    weight: Tensor  # sample weight, 0 where ignored
    total: Tensor  # number of positions not ignored, at least 1, as a float

    def weighted(self, value: Tensor) -> Tensor:
        """Multiply by the weight; what stands at an ignored position, NaN included, becomes 0."""
        return torch.where(self.valid, value * self.weight, 0.0)

    def plain(self, value: Tensor) -> Tensor:
        """Like ``weighted`` with all weights 1."""
        return torch.where(self.valid, value, 0.0)

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """Sum over positions / their count, or the value as it is."""
        return value.sum() / self.total if reduction == "mean" else value

    def reduce_each(self, values: list[Tensor], reduction: Reduction) -> tuple[Tensor, ...]:
        """Treat each like ``plain``, then like ``reduce``; for the mean at the price of one."""
        if reduction == "none":
            return tuple(self.plain(value) for value in values)
        return (self.plain(torch.stack(values)).flatten(1).sum(1) / self.total).unbind()


def positions_of(
    student_logits: Tensor, target: Tensor, *, ignore_index: int = -100, sample_weight: Tensor | None = None
) -> Positions:
    """Read labels (the argmax of probability targets), validity and weights; check target and sample_weight."""
    _checks.target(target, student_logits)
    if target.is_floating_point():
        label = target.argmax(1)
        valid = torch.ones_like(label, dtype=torch.bool)
    else:
        valid = target != ignore_index
        label = torch.where(valid, target, 0)
    weight = torch.ones_like(label, dtype=student_logits.dtype)
    if sample_weight is not None:
        _checks.sample_weight(sample_weight, student_logits)
        trailing = label.ndim - sample_weight.ndim
        weight = sample_weight.detach().to(student_logits.dtype).reshape(*sample_weight.shape, *[1] * trailing)
        weight = weight.expand(label.shape)
    return Positions(label, valid, weight, valid.sum().clamp(min=1).to(weight.dtype))


def by_position(value: Tensor) -> Tensor:
    """Turn (N, C, d1, ...) into (M, C), M = N d1 ..."""
    return value if value.ndim == 2 else value.movedim(1, -1).flatten(0, -2)


def soft_cross_entropy(student_logits: Tensor, target: Tensor) -> Tensor:
    """Return -sum_y p_y log s_y per position, nats, for probabilities p."""
    return -(target.to(student_logits.dtype) * log_softmax(student_logits, 1)).sum(1)


def label_cross_entropy(log_probs: Tensor, label: Tensor) -> Tensor:
    """Return -log s_label per position, nats."""
    return -log_probs.gather(1, label.unsqueeze(1)).squeeze(1)
