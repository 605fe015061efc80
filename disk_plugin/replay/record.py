"""The inputs of a guide pass from a batch, as rows to store, and the guide's loss from such rows."""

from typing import cast

import torch
from torch import Tensor

from .. import _checks
from .._modes import without_autocast
from ..functional._positions import by_position
from ..guide import GuideHead
from ..loss import DiSKLoss
from .constants import GuideConstants, guide_constants, guide_loss

_INPUTS = ("teacher_logits", "teacher_features")
_WIDE = (*_INPUTS, "target", "log_student")  # columns stored in ``dtype``; the others are float32 at least


@torch.no_grad()
def get_rows(
    disk: DiSKLoss,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    teacher_features: Tensor | None,
    sample_weight: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return a row per valid, finite position, by column; synchronizes with the device to count them.

    A batch that overflowed has a NaN loss, which a GradScaler skips; in the record it would turn the guide into NaN.
    """
    _checks.logits(student_logits, teacher_logits)
    with without_autocast(student_logits):
        constants = guide_constants(student_logits, teacher_logits, target, disk._settings(), sample_weight)
    inputs = _inputs(disk, teacher_logits, teacher_features)
    kept = constants.valid & (constants.offset + constants.budget_ce + constants.weight).isfinite()
    for value in inputs.values():
        kept &= value.flatten(1).isfinite().all(1)
    index = kept.nonzero().squeeze(1)
    rows = {**inputs, **constants._asdict()}
    del rows["valid"]
    return {name: _stored(name, value[index], dtype) for name, value in rows.items()}


def get_loss(disk: DiSKLoss, rows: dict[str, Tensor]) -> Tensor:
    """Return ``disk.terms(...).guide_loss`` of these rows, with the current settings."""
    dtype = torch.promote_types(rows["offset"].dtype, torch.float32)
    values = {name: value if name == "wrong" else value.to(dtype) for name, value in rows.items()}
    features = values.pop("teacher_features", None)
    logits = values.pop("teacher_logits", None)
    if logits is None:  # only their shape is used
        logits = values["offset"].new_zeros(()).expand(len(values["offset"]), cast(GuideHead, disk.guide).num_classes)
    constants = GuideConstants(valid=torch.ones_like(values["wrong"]), **values)
    with without_autocast(logits):
        own = disk.guide_logits(logits, features)
        placed = disk.level.place(own) if disk.level else own
        return guide_loss(constants, placed, disk._settings())


def _inputs(disk: DiSKLoss, teacher_logits: Tensor, teacher_features: Tensor | None) -> dict[str, Tensor]:
    """Return the guide's inputs by position: (M, C), (M, D); with logits (N, C), features may be (N, ...)."""
    reads_logits = not isinstance(disk.guide, GuideHead) or disk.guide.use_logits
    inputs = {"teacher_logits": by_position(teacher_logits)} if reads_logits else {}
    if teacher_features is None:
        if not reads_logits:
            raise ValueError("the guide reads features alone, got no teacher_features")
        return inputs
    _checks.tensor("teacher_features", teacher_features)
    count, *positions = (teacher_logits.shape[0], *teacher_logits.shape[2:])
    shape = tuple(teacher_features.shape)
    if len(shape) < 2 or shape[0] != count or (positions and list(shape[2:]) not in ([], positions)):
        dense = f" or ({count}, D, {', '.join(map(str, positions))})" if positions else ""
        raise ValueError(f"teacher_features must have shape ({count}, D){dense}, got {shape}")
    if positions:
        pooled = shape[2:] == ()
        spread = teacher_features.reshape(*shape, *[1] * len(positions)) if pooled else teacher_features
        teacher_features = by_position(spread.expand(-1, -1, *positions))
    return {**inputs, "teacher_features": teacher_features}


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a column to its dtype; log s and features may exceed the range of float16."""
    if value.dtype == torch.bool:
        return value
    dtype = dtype if name in _WIDE else torch.promote_types(dtype, torch.float32)
    largest = torch.finfo(dtype).max
    # clamped in a dtype that holds both ranges, as the input's may be narrower than the bound
    return value.to(torch.promote_types(value.dtype, dtype)).clamp(-largest, largest).to(dtype)
