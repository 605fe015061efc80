"""Equation (3): the guide's usage, and its excess over the budget."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .. import _checks
from ..variants import Variant
from ._positions import REDUCTIONS, Positions, Reduction, get_positions, promote, without_ignored
from .cross_entropy import label_cross_entropy


def usage(
    student_logits: Tensor,
    target: Tensor,
    guide_logits: Tensor,
    *,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return the guide's usage, the mean in eq. (3) of Kag et al. (ICLR 2023): g times the cross-entropy at tau = 1.

    $$\frac1N \sum_i g(x_i)\,(-\log s_{y_i}(x_i))$$

    Args:
        student_logits: before softmax.
        target: class indices, or probabilities of the logits' shape, whose argmax is used.
        guide_logits: the guide before its sigmoid.
        ignore_index: target value that is ignored and does not contribute to the gradient.
        sample_weight: weight per sample or target; the mean still divides by the number of non-ignored targets.
        reduction: ``"mean"`` over the non-ignored targets, ``"sum"`` or ``"none"``.

    Shape:
        student_logits (N, C) or (N, C, d1, ...); target (N, d1, ...) or the logits'; guide_logits (N,) or
        (N, d1, ...). Returns a scalar in nats per sample, or (N, d1, ...) with 0 for ignored targets.

    Raises:
        ValueError: shapes that do not fit; an unknown reduction.
        TypeError: logits not floating-point, or a target that is neither int64 nor floating-point.
    """
    _checks.logits(student_logits, student_logits)
    _checks.per_position("guide_logits", guide_logits, student_logits)
    _checks.choice("reduction", reduction, REDUCTIONS)
    s, g = promote(student_logits, guide_logits)
    where = get_positions(s, target, ignore_index=ignore_index, sample_weight=sample_weight)
    s = without_ignored(s, where.masked)
    spent = where.plain(g).sigmoid() * label_cross_entropy(log_softmax(s, 1), where.label)
    return where.reduce(where.weighted(spent), reduction)


def violation(usage: Tensor, budget: float | Tensor) -> Tensor:
    """Return usage - budget, nats per sample, of any shape: positive if the budget is exceeded."""
    return usage - budget


def budget_loss(usage: Tensor, budget: float | Tensor) -> Tensor:
    """Return (usage - budget)_+, nats per sample, Kag et al. (ICLR 2023), eq. (3); ``usage`` is the mean, a scalar."""
    return violation(usage, budget).relu()


def clamped(ce: Tensor, variant: Variant) -> Tensor:
    """Clamp the budget's cross-entropy if the variant does."""
    return ce if variant.budget_clamp is None else ce.clamp(max=variant.budget_clamp)


def over_denominator(
    ce: Tensor,
    wrong: Tensor,
    where: Positions,
    variant: Variant,
    reduce_mean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scale the budget's cross-entropy so that its mean over positions has the variant's denominator.

    With ``reduce_mean`` the number of errors is the mean over the parts of the full batch.
    """
    if variant.budget_denominator == "samples":
        return ce
    errors = (wrong & where.valid).sum().to(ce.dtype)
    if reduce_mean is not None:
        errors = reduce_mean(errors)
    # a batch without errors divides by 1, not by 0
    return ce * (where.total / torch.where(errors > 0, errors, 1.0))


def hinge(spent: Tensor, where: Positions, budget: float | Tensor, mean_usage: Tensor, reduction: Reduction) -> Tensor:
    """Return (3) from g * CE per position; with "none", values whose mean is the full batch's hinge."""
    # one gate for all positions, as (3) is one hinge over a mean; a NaN mean propagates
    exceeded = torch.where(mean_usage <= budget, 0.0, violation(spent, budget))
    return where.reduce(where.plain(exceeded), reduction)
