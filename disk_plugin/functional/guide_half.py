"""The guide's half of eq. (5), and the constants that it reads: all that the guide needs while the student is fixed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from ..variants import Variant
from ._positions import Positions, Reduction, as_dtype, by_position, label_cross_entropy, positions_of, promote
from .blocks import softened_teacher, with_guide
from .budget import clamped, hinge, over_denominator
from .scaffold import mask_or_none

# Guide logits between which the scaled gradient is at work, g = .0009 to .953. The ends differ because g counts against
# the student's probabilities: .95 is as good as 1, while s_k << .01 (many classes) still tells g = .01 from .001.
REACH = (-7.0, 3.0)
LEAST_SLOPE = 1e-4  # of the mean discount by log g: below it the batch does not tell the price of a discount
SPRING = 0.1  # per unit of logit beyond REACH, at most 1 in all; the scaled slope of (5) is of order 1 too


class GuideConstants(NamedTuple):
    """What the guide's half of (5) reads of teacher and student, for M positions; no gradient."""

    target: Tensor  # t_k of the K scaffolded classes, (M, K); 0 where a position has fewer
    log_student: Tensor  # log s_k of these, (M, K)
    offset: Tensor  # what g does not change: sum_y t_y log t_y - sum_(y not in K) t_y log s_y, nats, (M,)
    budget_ce: Tensor  # the budget's cross-entropy, nats, (M,); its denominator is a batch's
    wrong: Tensor  # bool, (M,): the student's argmax is not the label
    factor: Tensor  # tau tau_s, (M,)
    weight: Tensor  # sample weight, (M,)
    valid: Tensor  # bool, (M,): not under ignore_index


class GuideHalf(NamedTuple):
    """What the guide adds to eq. (5), reduced but for the first two; only ``gradient`` reaches the guide."""

    guide: Tensor  # g per position
    spent: Tensor  # g times the budget's cross-entropy per position
    over_budget: Tensor  # multiplier (usage - budget)_+; a scalar 0 where the discount is held
    penalty: Tensor  # the authors' extra term; a scalar 0 in the paper's variant
    gradient: Tensor  # 0, with the gradient of scaffold, budget and penalty


@torch.no_grad()
def guide_constants(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    student_temperature: float | Tensor,
    top_k: int | None,
    variant: Variant,
    ignore_index: int,
    sample_weight: Tensor | None = None,
) -> GuideConstants:
    """Evaluate them for M = N d1 ... positions, with the arguments of ``disk_terms``."""
    s, t = promote(student_logits, teacher_logits)
    tau_s = as_dtype(student_temperature, s.dtype)
    where = positions_of(s, target, ignore_index=ignore_index, sample_weight=sample_weight)
    mask = mask_or_none(t, top_k, where.label if variant.scaffold_label else None)
    s, t = by_position(s), by_position(t)
    label = where.label.flatten()
    mask = None if mask is None else by_position(mask)
    log_t, target_t = softened_teacher(t, mask, temperature, variant.teacher_target == "scaffolded")
    log_s = log_softmax(s / tau_s, 1)
    offset = (target_t * log_t).sum(1)
    if mask is not None and top_k is not None:
        offset = offset - torch.where(mask, 0.0, target_t * log_s).sum(1)
        ids = mask.to(s.dtype).topk(min(top_k + variant.scaffold_label, s.shape[1]), 1).indices
        inside = mask.gather(1, ids)  # one class short where the label is among the top-K
        target_t, log_s = (torch.where(inside, value.gather(1, ids), 0.0) for value in (target_t, log_s))
    counted = t.argmax(1) if variant.budget_label == "teacher" else label
    return GuideConstants(
        target=target_t,
        log_student=log_s,
        offset=offset,
        budget_ce=clamped(label_cross_entropy(log_softmax(s, 1), counted), variant),
        wrong=s.argmax(1) != label,
        factor=torch.ones_like(offset) * temperature * tau_s,
        weight=where.weight.flatten(),
        valid=where.valid.flatten(),
    )


def guide_loss(
    constants: GuideConstants,
    guide_logits: Tensor,
    *,
    distill_weight: float,
    multiplier: float | Tensor,
    budget: float | Tensor,
    top_k: int | None,
    variant: Variant,
    guide_gradient_scale: float | None,
    hold_discount: bool = False,
    reduce_mean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return ``disk_terms(...).guide_loss`` of a batch of positions from its constants and guide logits (M,)."""
    guide_logits, offset = promote(guide_logits, constants.offset)
    valid, factor = constants.valid, constants.factor
    total = valid.sum().clamp(min=1).to(offset.dtype)
    where = Positions(valid.long(), valid, constants.weight, total)  # no label is read
    log_g = logsigmoid(guide_logits.detach()).unsqueeze(1)
    scaffolded, share, kept = with_guide(constants.log_student, log_g)
    kl, taken = offset - (constants.target * scaffolded).sum(1), constants.target * share
    removed = taken.sum(1)
    half = guide_half(
        guide_logits,
        removed,
        over_denominator(constants.budget_ce, constants.wrong, where, variant, reduce_mean),
        where,
        factor=factor,
        classes=min(top_k or constants.target.shape[1], constants.target.shape[1]),
        distill_weight=distill_weight,
        multiplier=multiplier,
        budget=budget,
        variant=variant,
        guide_gradient_scale=guide_gradient_scale,
        discount_slope=(taken * kept).sum(1) if hold_discount else None,
        reduce_mean=reduce_mean,
        reduction="mean",
    )
    distill = where.reduce(distill_weight * where.weighted(factor * kl), "mean")
    return distill + half.over_budget + half.penalty + half.gradient


def guide_half(
    guide_logits: Tensor,
    removed: Tensor,
    budget_ce: Tensor,
    where: Positions,
    *,
    factor: float | Tensor,
    classes: int,
    distill_weight: float,
    multiplier: float | Tensor,
    budget: float | Tensor,
    variant: Variant,
    guide_gradient_scale: float | None,
    discount_slope: Tensor | None,
    reduce_mean: Callable[[Tensor], Tensor] | None,
    reduction: Reduction,
) -> GuideHalf:
    """Evaluate what (5) asks of the guide; ``factor`` is tau tau_s, ``classes`` K, ``removed`` as in ``Rows``.

    ``discount_slope`` is the ``slope`` of ``Rows`` where the mean discount is held, None where the budget's hinge acts.
    Values carry no graph of the guide, whose gradient is in closed form; that of the student passes through
    ``budget_ce``.
    """
    logits = guide_logits.detach()
    g = logits.sigmoid()
    spent = where.weighted(g * budget_ce)
    penalty = g.new_zeros(())
    if variant.guide_penalty:  # the authors' log(1 + K g)
        penalty = where.reduce(where.weighted(variant.guide_penalty * torch.log1p(classes * g)), reduction)
    if discount_slope is not None:
        over_budget, slope = g.new_zeros(()), _held_slope(removed, discount_slope, logits, where, reduce_mean)
    else:
        lam, delta = as_dtype(multiplier, logits.dtype), as_dtype(budget, logits.dtype)
        mean_usage = where.reduce(spent.detach(), "mean")
        if reduce_mean is not None:
            mean_usage = reduce_mean(mean_usage)
        over_budget = lam * hinge(spent, where, delta, mean_usage, reduction)
        # the hinge's gate comes last: a number times a bool would be float32
        by_g = lam * budget_ce.detach() * (mean_usage > delta)
        if variant.guide_penalty:
            by_g = by_g + variant.guide_penalty * classes / (1 + classes * g)
        slope = distill_weight * _distill_slope(factor, removed, logits) + by_g * g * (1 - g)
        if guide_gradient_scale is not None:
            slope = guide_gradient_scale * _well_scaled(slope, logits, 1 / (factor + lam))
    return GuideHalf(
        guide=g,
        spent=spent,
        over_budget=over_budget,
        penalty=penalty,
        gradient=where.reduce(where.weighted(slope * _zero_valued(guide_logits)), reduction),
    )


def _distill_slope(factor: float | Tensor, removed: Tensor, guide_logits: Tensor) -> Tensor:
    """Return d L_dist / d guide logit per position, in closed form.

    d L_dist / d log g = -tau tau_s sum_k t_k g / (s_k + g), which the discount needs anyway, and d log g / d logit =
    1 - g: the scaffold is evaluated and differentiated once, for the student, and the guide's half costs (N,) more.
    """
    return -factor * removed * (-guide_logits).sigmoid()


def _held_slope(
    removed: Tensor,
    discount_slope: Tensor,
    guide_logits: Tensor,
    where: Positions,
    reduce_mean: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    r"""Return the slope of L_dist / (tau tau_s) by the guide's logit, along which the mean discount does not change.

    -D + mu V, with D and V the slopes of -L_dist and of the discount, and mu = mean D / mean V the price of a discount:
    raising g pays where it takes off more of the divergence than its share of the discount costs. Their sum over the
    batch is 0: how large g is in the mean is decided by whoever holds the discount. At most 1, so that no sample
    carries a batch.
    """
    left = (-guide_logits).sigmoid()  # d log g / d logit
    gain, cost = removed * left, discount_slope * left
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
