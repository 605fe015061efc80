"""The difference between a cache and the teacher's current outputs."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor | None]  # logits and features


def largest_difference(
    read: Callable[[Tensor, Tensor], Outputs],
    recompute: Callable[[Tensor], Outputs],
    loader: Iterable[tuple[Tensor, Tensor]],
    samples: int,
) -> tuple[float, str]:
    """Return the largest difference over a loader's (images, rows), as a share of the sample's largest value.

    ``read`` takes (index, view), ``recompute`` images; row = view * samples + index.

    Returns:
        That difference, inf for a NaN, and a description of its place.
    """
    largest, where = 0.0, ""
    for images, rows in loader:
        index, view = rows % samples, rows // samples
        for name, cached, fresh in zip(("logits", "features"), read(index, view), recompute(images), strict=True):
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
