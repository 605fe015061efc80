"""The distances of CIFD, per sample: distortion of embeddings and divergence of class distributions."""

import torch
from torch import Tensor

DISTORTIONS: tuple[str, ...] = ("mse", "smooth_l1")
REDUCTIONS: tuple[str, ...] = ("mean", "sum")


def distortion(found: Tensor, wanted: Tensor, kind: str, reduction: str = "mean") -> Tensor:
    """Return the distance of embeddings (..., D), squared or smooth L1, its mean or sum over D."""
    difference = found - wanted
    each = difference.square()
    if kind == "smooth_l1":
        size = difference.abs()
        each = torch.where(size < 1, each / 2, size - 0.5)
    return each.mean(-1) if reduction == "mean" else each.sum(-1)


def divergence(student_logits: Tensor, source_logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(source || student) of (..., C), nats; both sides are divided by T."""
    log_q, log_p = (torch.log_softmax(each / temperature, -1) for each in (student_logits, source_logits))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
