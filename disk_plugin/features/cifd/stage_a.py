"""The losses of rate-distortion modules: eq. (4), and eq. (5) for classifiers, of CIFD (NeurIPS 2024)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .distances import distortion, divergence
from .embeddings import Rows
from .modules import RateDistortionModule


class StageALoss(NamedTuple):
    """Losses of M modules per sample, (M, N); ``total`` is what a module minimizes.

    Attributes:
        total: ce_weight ce + kl_weight kl + R distortion + rate.
        rate: nats, summed over channels.
        distortion: of the reconstruction.
        ce: cross-entropy; 0 without classes.
        kl: T^2 KL(teacher || module); 0 without classes.
    """

    total: Tensor
    rate: Tensor
    distortion: Tensor
    ce: Tensor
    kl: Tensor


def stage_a_loss(
    modules: RateDistortionModule,
    rows: Rows,
    *,
    kind: str = "smooth_l1",
    reduction: str = "mean",
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 2.0,
) -> tuple[StageALoss, Tensor | None]:
    """Evaluate eq. (4), with classes eq. (5), and return the modules' logits (M, N, C) too."""
    found = modules(rows.features)
    rate = modules.rate(found.code)
    distance = distortion(found.reconstruction, rows.features, kind, reduction)
    weights = torch.tensor(modules.distortion_weights, dtype=distance.dtype, device=distance.device)
    ce = kl = torch.zeros_like(rate)
    if found.logits is not None and rows.logits is not None and rows.target is not None:
        target = rows.target.expand(len(modules), *rows.target.shape).flatten(0, 1)
        ce = cross_entropy(found.logits.flatten(0, 1), target, reduction="none").view(rate.shape)
        kl = divergence(found.logits, rows.logits, temperature)
    total = ce_weight * ce + kl_weight * kl + weights.unsqueeze(1) * distance + rate
    return StageALoss(total, rate, distance, ce, kl), found.logits
