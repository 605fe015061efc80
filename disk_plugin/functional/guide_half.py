"""The guide's half of eq. (5), and what it reads: all that the guide needs while the student is fixed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._positions import Positions, Reduction, as_dtype
from ._settings import Settings
from .budget import hinge

# Guide logits between which the scaled gradient is at work, g = .0009 to .953. The ends differ because g counts against
# the student's probabilities: .95 is as good as 1, while s_k << .01 (many classes) still tells g = .01 from .001.
REACH = (-7.0, 3.0)
LEAST_SLOPE = 1e-4  # of the mean discount by log g: below it the batch does not tell the price of a discount
SPRING = 0.1  # per unit of logit beyond REACH, at most 1 in all; the scaled slope of (5) is of order 1 too


class StudentSide(NamedTuple):
    """What the guide's half reads of student and teacher, per position."""

    removed: Tensor  # as in ``Rows``
    slope: Tensor  # as in ``Rows``
    budget_ce: Tensor  # the budget's cross-entropy over the variant's denominator, nats; the student's graph ends here
    factor: float | Tensor  # tau tau_s
    classes: int  # K


class GuideHalf(NamedTuple):
    """What the guide adds to eq. (5), reduced but for the first two; only ``gradient`` reaches the guide."""

    guide: Tensor  # g per position
    spent: Tensor  # g times the budget's cross-entropy per position
    over_budget: Tensor  # multiplier (usage - budget)_+; a scalar 0 where the discount is held
    penalty: Tensor  # the authors' extra term; a scalar 0 in the paper's variant
    gradient: Tensor  # 0, with the gradient of scaffold, budget and penalty


def guide_half(
    guide_logits: Tensor, student: StudentSide, where: Positions, settings: Settings, reduction: Reduction
) -> GuideHalf:
    """Evaluate what (5) asks of the guide: under the budget's hinge, or at a mean discount that is held.

    Values carry no graph of the guide, whose gradient is in closed form; that of the student passes through
    ``budget_ce``.
    """
    logits, penalty_weight = guide_logits.detach(), settings.variant.guide_penalty
    g = logits.sigmoid()
    spent = where.weighted(g * student.budget_ce)
    penalty = over_budget = g.new_zeros(())
    if penalty_weight:  # the authors' log(1 + K g)
        penalty = where.reduce(where.weighted(penalty_weight * torch.log1p(student.classes * g)), reduction)
    if settings.hold_discount:
        slope = _held_slope(student, logits, where, settings.reduce_mean)
    else:
        lam, delta = as_dtype(settings.multiplier, logits.dtype), as_dtype(settings.budget, logits.dtype)
        mean_usage = where.reduce(spent.detach(), "mean")
        if settings.reduce_mean is not None:
            mean_usage = settings.reduce_mean(mean_usage)
        over_budget = lam * hinge(spent, where, delta, mean_usage, reduction)
        # the hinge's gate comes last: a number times a bool would be float32
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

    d L_dist / d log g = -tau tau_s sum_k t_k g / (s_k + g), which the discount needs anyway, and d log g / d logit =
    1 - g: the scaffold is evaluated and differentiated once, for the student, and the guide's half costs (N,) more.
    """
    return -student.factor * student.removed * (-guide_logits).sigmoid()


def _held_slope(
    student: StudentSide, guide_logits: Tensor, where: Positions, reduce_mean: Callable[[Tensor], Tensor] | None
) -> Tensor:
    r"""Return the slope of L_dist / (tau tau_s) by the guide's logit, along which the mean discount does not change.

    -D + mu V, with D and V the slopes of -L_dist and of the discount, and mu = mean D / mean V the price of a discount:
    raising g pays where it takes off more of the divergence than its share of the discount costs. Their sum over the
    batch is 0: how large g is in the mean is decided by whoever holds the discount. At most 1, so that no sample
    carries a batch.
    """
    left = (-guide_logits).sigmoid()  # d log g / d logit
    gain, cost = student.removed * left, student.slope * left
    sound = (gain + cost).isfinite()  # a row that is broken breaks the loss, but not the price for the others
    means = torch.stack([where.reduce(torch.where(sound, where.weighted(each), 0.0), "mean") for each in (gain, cost)])
    if reduce_mean is not None:
        means = reduce_mean(means)
    return (means[0] / means[1].clamp(min=LEAST_SLOPE) * cost - gain).clamp(-1, 1)


def _well_scaled(slope: Tensor, guide_logits: Tensor, scale: float | Tensor) -> Tensor:
    """Turn the slope by the guide's logit into that by g (equal at g = 1/2), and hold the logits within REACH.

    By the logit, every slope carries the sigmoid's derivative g (1 - g). At a small multiplier (5) is least at g = 1 on
    every sample; once there the derivative is 0 and no multiplier brings any g back: the guide has died. By g the pull
    back keeps its strength (in terms of the logit: mirror descent with the binary entropy); it changes the size of each
    sample's slope, not the g at which it is zero. Beyond REACH, where momentum may carry the logits and where (5) may
    be least for a while, a spring leads back.
    """
    held = guide_logits.clamp(*REACH)
    g = held.sigmoid()
    return scale * slope / (4 * g * (1 - g)) + (SPRING * (guide_logits - held)).clamp(-1, 1)


def _zero_valued(guide_logits: Tensor) -> Tensor:
    """Zero with gradient one; an infinite guide logit (g exactly 0 or 1) has slope 0, and inf - inf would be NaN."""
    finite = guide_logits.masked_fill(guide_logits.isinf(), 0.0)
    return finite - finite.detach()
