"""How far a cache is from what the teacher computes now."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .teacher_cache import TeacherCache

Outputs = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def largest_difference(
    cache: "TeacherCache", outputs: Outputs, loader: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, str]:
    """Return the largest difference over a loader's (images, rows), as a share of its sample's largest value.

    Returns:
        That difference, inf where a value is NaN, and the words for its place.
    """
    largest, where = 0.0, ""
    for images, rows in loader:
        index, view = rows % cache.samples, rows // cache.samples
        for name, cached, fresh in zip(("logits", "features"), cache(index, view), outputs(images), strict=True):
            if cached is None or fresh is None:
                continue
            difference, row = _relative(cached, fresh).max(dim=0)
            if difference > largest:
                largest, where = difference.item(), f"the {name} of index {index[row]}, view {view[row]}"
    return largest, where


def _relative(cached: Tensor, fresh: Tensor) -> Tensor:
    """Return each row's largest difference as a share of its largest absolute value, (N,)."""
    if cached.shape != fresh.shape:
        raise RuntimeError(f"the teacher must give outputs of shape {tuple(cached.shape)}, got {tuple(fresh.shape)}")
    size = fresh.abs().amax(dim=1).clamp(min=torch.finfo(torch.float16).tiny)
    return ((cached - fresh).abs().amax(dim=1) / size).nan_to_num(nan=torch.inf)
