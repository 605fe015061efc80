"""The guide's own optimizer for Algorithm 1, by timm's names, and its learning rate."""

import math
from collections.abc import Callable

import torch
from timm.optim import create_optimizer_v2

from disk_plugin import DiSKLoss

from .recipe import Recipe


def build_guide_optimizer(recipe: Recipe, disk: DiSKLoss) -> torch.optim.Optimizer:
    """Build the guide's optimizer from the recipe."""
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        disk.guide,
        opt=recipe.guide_opt,
        lr=recipe.guide_lr,
        momentum=recipe.guide_momentum,
        weight_decay=recipe.guide_weight_decay,
    )
    return optimizer


def cosine(rate: float, epochs: int | None) -> Callable[[int], float]:
    """Return a cosine from ``rate`` to 0 over ``epochs``, as a function of the epoch from 0; None: constant."""

    def at(epoch: int) -> float:
        progress = min(epoch / epochs, 1.0) if epochs else 0.0
        return rate * (1 + math.cos(math.pi * progress)) / 2

    return at
