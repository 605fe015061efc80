"""The map before the last stage of models with timm's ``forward_intermediates``, in the pass that makes the last map.

timm is not imported: a model only has to have the methods.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._modes import in_mode

_RELATIVE_TOLERANCE = 1e-3  # a wrong map differs by the size of the map, another order of operations by rounding


class Intermediate(NamedTuple):
    """Reads the map before the last stage, (N, C, H, W); made by ``of``.

    For a model whose maps have one shape (ViT, Mixer) it is the map after three quarters of the blocks, as in ScaleKD
    (Fan et al., NeurIPS 2024): after the ninth of twelve.

    Attributes:
        position: of the map in ``forward_intermediates``.
    """

    position: int

    @classmethod
    def of(cls, model: Any, images: Tensor) -> "Intermediate":
        """Find the map by the shapes of all maps of a model.

        Raises:
            ValueError: the model has no ``forward_intermediates``, only one map, or another last map with it than
                without it.
        """
        kind = type(model).__name__
        if not all(hasattr(model, name) for name in ("forward_intermediates", "forward_features", "forward_head")):
            raise ValueError(f"the map before the last stage is read by timm's forward_intermediates, {kind} has none")
        with in_mode(model, training=False), torch.no_grad():
            last, maps = model.forward_intermediates(images, output_fmt="NCHW")
            expected = model.forward_features(images)
        if last.shape != expected.shape or not (last - expected).norm() <= _RELATIVE_TOLERANCE * expected.norm():
            raise ValueError(f"forward_intermediates of {kind} does not end with the map of its forward_features")
        if len(maps) < 2:
            raise ValueError(f"{kind} must have two stages or blocks at least, got {len(maps)}")
        shapes = [tuple(each.shape[1:]) for each in maps]  # with the width: a last stage may keep the size
        others = [index for index, shape in enumerate(shapes) if shape != shapes[-1]]
        return cls(others[-1] if others else max(round(0.75 * len(maps)) - 1, 0))

    def __call__(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``forward_features`` would, and the map before the last stage."""
        last, (found,) = model.forward_intermediates(images, indices=[self.position], output_fmt="NCHW")
        return last, found
