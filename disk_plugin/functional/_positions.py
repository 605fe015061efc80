"""Positions, their labels and weights, and the reduction of values per position.

A position is one target: a sample, or with dense logits (N, C, d1, ...) one pixel of it. It is valid if not ignored.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Upcast half-precision tensors to float32 and mixed dtypes to the wider one; float64 stays float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def to_dtype(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Cast a scalar tensor: a float64 one would promote a float32 loss, which is also a scalar.

    Always a copy: the graph must not hold a buffer that the next batch or the scheduler updates in place.
    """
    return value.detach().to(dtype, copy=True) if isinstance(value, Tensor) else value


def valid_or_none(target: Tensor, ignore_index: int) -> Tensor | None:
    """Return the mask of valid positions, (N, d1, ...), or None if all are valid and that is known for free.

    On CPU tensors it is; on others the check would synchronize with the device.
    """
    if target.is_floating_point():
        return None
    valid = target != ignore_index
    return None if _readable(target) and bool(valid.all()) else valid


def _readable(value: Tensor) -> bool:
    """Whether a value can be read without synchronizing with a device or breaking a graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _check_range(label: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for class indices out of range; on other devices than a CPU ``gather`` raises."""
    if not label.numel() or not _readable(label):
        return
    for found in label.aminmax():
        if not 0 <= found < classes:
            raise ValueError(
                f"target must be class indices in [0, {classes}), the number of the logits' classes, or "
                f"ignore_index={ignore_index}, got {int(found)}"
            )


def without_ignored(value: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the ignored positions of (N, D, d1, ...), before anything is computed from them.

    Multiplying by 0 afterwards is too late: the gradient of a NaN or inf would be 0 times NaN.
    """
    if valid is None:
        return value
    return torch.where(valid.unsqueeze(1), value, 0.0)


def guide_input(value: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Zero the ignored positions, or, in features of another layout than the target, fully ignored samples."""
    valid = valid_or_none(target, ignore_index)
    if valid is None or value.shape[2:] == valid.shape[1:]:
        return without_ignored(value, valid)
    whole = valid.flatten(1).any(1) if valid.ndim > 1 else valid
    return torch.where(whole.reshape(-1, *[1] * (value.ndim - 1)), value, 0.0)


def transformed() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad) is active, under which values cannot be read."""
    return bool(torch._C._are_functorch_transforms_active())


class Positions(NamedTuple):
    """Labels and weights of the positions of one batch; every field but ``total`` is (N, d1, ...)."""

    label: Tensor  # int64; 0 where ignored, a valid index for gather
    valid: Tensor  # bool
    weight: Tensor  # sample weight, 0 where ignored
    total: Tensor  # number of valid positions, at least 1, as a float
    masked: Tensor | None = None  # ``valid``, or None if all are and no masking is needed

    def weighted(self, value: Tensor) -> Tensor:
        """Multiply by the weight; ignored positions become 0."""
        return self.plain(value) * self.weight

    def plain(self, value: Tensor) -> Tensor:
        """Like ``weighted`` with all weights 1."""
        return value if self.masked is None else torch.where(self.masked, value, 0.0)

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """Return the sum over positions / their count, their sum, or the value itself."""
        if reduction == "none":
            return value
        return value.sum() / self.total if reduction == "mean" else value.sum()

    def reduce_each(self, values: list[Tensor], reduction: Literal["mean", "none"]) -> tuple[Tensor, ...]:
        """Apply ``plain`` and ``reduce`` to each value; the mean takes one pass for all."""
        if reduction == "none":
            return tuple(self.plain(value) for value in values)
        return (self.plain(torch.stack(values)).flatten(1).sum(1) / self.total).unbind()


def get_positions(
    student_logits: Tensor, target: Tensor, *, ignore_index: int = -100, sample_weight: Tensor | None = None
) -> Positions:
    """Return labels (the argmax of probability targets), validity and weights; validate target and sample_weight."""
    _checks.target(target, student_logits)
    masked = valid_or_none(target, ignore_index)
    if target.is_floating_point():
        label = target.argmax(1)
    else:
        label = target if masked is None else torch.where(masked, target, 0)
        _check_range(label, student_logits.shape[1], ignore_index)
    valid = torch.ones_like(label, dtype=torch.bool) if masked is None else masked
    weight = torch.ones_like(label, dtype=student_logits.dtype)
    if sample_weight is not None:
        _checks.sample_weight(sample_weight, student_logits)
        trailing = label.ndim - sample_weight.ndim
        weight = sample_weight.detach().to(student_logits.dtype).reshape(*sample_weight.shape, *[1] * trailing)
        weight = torch.where(valid, weight, 0.0)
    return Positions(label, valid, weight, valid.sum().clamp(min=1).to(weight.dtype), masked)


def by_position(value: Tensor) -> Tensor:
    """Reshape (N, C, d1, ...) to (M, C), M = N d1 ..."""
    return value if value.ndim == 2 else value.movedim(1, -1).flatten(0, -2)
