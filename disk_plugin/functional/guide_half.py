"""The guide's half of eq. (5), and its inputs from a fixed student."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._positions import Positions, Reduction, to_dtype
from ._settings import Settings
from .budget import hinge

# Range of guide logits for the scaled gradient, g = .0009 to .953. It is asymmetric because g is compared with the
# student's probabilities: .95 is as good as 1, while with s_k << .01 (many classes) g = .01 and .001 still differ.
REACH = (-7.0, 3.0)
LEAST_SLOPE = 1e-4  # of the mean discount w.r.t. log g; below it a batch does not determine the price of a discount
SPRING = 0.1  # per unit of logit outside REACH, clamped to 1; the scaled gradient of (5) is of order 1 too


class StudentSide(NamedTuple):
    """Inputs of the guide's half from student and teacher, per position."""

    removed: Tensor  # as in ``Rows``
    slope: Tensor  # d discount / d log g
    budget_ce: Tensor  # the budget's cross-entropy over the variant's denominator, nats; may carry the student's graph
    factor: float | Tensor  # tau tau_s
    classes: int  # K


class GuideHalf(NamedTuple):
    """The guide's terms of eq. (5), reduced except for the first two; only ``gradient`` reaches the guide."""

    guide: Tensor  # g per position
    spent: Tensor  # g times the budget's cross-entropy per position
    over_budget: Tensor  # multiplier (usage - budget)_+; a scalar 0 with ``hold_discount``
    penalty: Tensor  # the authors' extra term; a scalar 0 in the paper's variant
    gradient: Tensor  # value 0, with the gradient of scaffold, budget and penalty


def guide_half(
    guide_logits: Tensor, student: StudentSide, where: Positions, settings: Settings, reduction: Reduction
) -> GuideHalf:
    """Evaluate the guide's half of (5), under the budget's hinge or at a fixed mean discount (``hold_discount``).

    Values are detached from the guide, whose gradient is in closed form; the student's graph passes through
    ``budget_ce``.
    """
    logits = guide_logits.detach()
    penalty_weight = 0.0 if settings.hold_discount else settings.variant.guide_penalty
    g = logits.sigmoid()
    spent = where.weighted(g * student.budget_ce)
    penalty = over_budget = g.new_zeros(())
    if penalty_weight:  # the authors' log(1 + K g)
        penalty = where.reduce(where.weighted(penalty_weight * torch.log1p(student.classes * g)), reduction)
    if settings.hold_discount:
        slope = _held_slope(student, logits, where, settings.reduce_mean)
    else:
        lam, delta = to_dtype(settings.multiplier, logits.dtype), to_dtype(settings.budget, logits.dtype)
        mean_usage = where.reduce(spent.detach(), "mean")
        if settings.reduce_mean is not None:
            mean_usage = settings.reduce_mean(mean_usage)
        over_budget = lam * hinge(spent, where, delta, mean_usage, reduction)
        # the hinge's gate comes last: a Python number times a bool tensor would be float32
        by_g = lam * student.budget_ce.detach() * (mean_usage > delta)
        if penalty_weight:
            by_g = by_g + penalty_weight * student.classes / (1 + student.classes * g)
        slope = settings.distill_weight * _distill_slope(student, logits) + by_g * g * (1 - g)
        if settings.guide_gradient_scale is not None:
            slope = settings.guide_gradient_scale * _well_scaled(slope, logits, 1 / (student.factor + lam))
    return GuideHalf(
        guide=g,
        spent=spent,
        over_budget=over_budget,
        penalty=penalty,
        gradient=where.reduce(where.weighted(slope * _zero_valued(guide_logits)), reduction),
    )


def _distill_slope(student: StudentSide, guide_logits: Tensor) -> Tensor:
    """Return d L_dist / d guide logit per position, in closed form.

    It is d L_dist / d log g = -tau tau_s sum_k t_k g / (s_k + g), which the discount needs anyway, times d log g / d
    logit = 1 - g. So the scaffold is evaluated once, for the student, and the guide's half adds O(N).
    """
    return -student.factor * student.removed * (-guide_logits).sigmoid()


def _held_slope(
    student: StudentSide, guide_logits: Tensor, where: Positions, reduce_mean: Callable[[Tensor], Tensor] | None
) -> Tensor:
    r"""Return the gradient w.r.t. the guide's logit of L_dist / (tau tau_s) + mu * discount, a Lagrangian.

    That is -D + mu V, with D and V the gradients of -L_dist / (tau tau_s) and of the discount, and mu = mean D / mean V
    the price of a discount: g rises where it takes off more of the divergence than its share of the discount costs. The
    mean over the batch is 0, as the level of g is set elsewhere (``DiscountLevel``). Clamped to [-1, 1], so that no
    sample dominates a batch.
    """
    left = (-guide_logits).sigmoid()  # d log g / d logit
    gain, cost = student.removed * left, student.slope * left
    sound = (gain + cost).isfinite()  # a row that is not finite does not affect the price for others
    means = torch.stack([where.reduce(torch.where(sound, where.weighted(each), 0.0), "mean") for each in (gain, cost)])
    if reduce_mean is not None:
        means = reduce_mean(means)
    return (means[0] / means[1].clamp(min=LEAST_SLOPE) * cost - gain).clamp(-1, 1)


def _well_scaled(slope: Tensor, guide_logits: Tensor, scale: float | Tensor) -> Tensor:
    """Rescale the logit gradient to one w.r.t. g (equal at g = 1/2); add a linear restoring force outside REACH.

    The gradient w.r.t. the logit has a factor g (1 - g), the sigmoid's derivative. At a small multiplier (5) is minimal
    at g = 1 on every sample, where that factor is 0 and no multiplier brings g back: the guide is dead. The gradient
    w.r.t. g does not vanish (mirror descent with the binary entropy). It changes the size of each sample's gradient,
    not the g at which it is zero. The restoring force is for logits that momentum, or (5) while its minimum is there,
    carries outside REACH.
    """
    held = guide_logits.clamp(*REACH)
    g = held.sigmoid()
    return scale * slope / (4 * g * (1 - g)) + (SPRING * (guide_logits - held)).clamp(-1, 1)


def _zero_valued(guide_logits: Tensor) -> Tensor:
    """Return 0 with gradient 1; an infinite guide logit (g exactly 0 or 1) gets gradient 0, as inf - inf is NaN."""
    finite = guide_logits.masked_fill(guide_logits.isinf(), 0.0)
    return finite - finite.detach()
