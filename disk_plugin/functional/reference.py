"""Equations (3) to (5) as printed, in plain autograd: to read, to fork, and for double backward.

``disk_terms`` evaluates the same in blocks, with closed-form gradients. Every ``detach`` here is a stop-gradient of the
method.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from .. import _checks
from ..variants import Variant, resolve_variant
from ._positions import (
    REDUCTIONS,
    Reduction,
    get_positions,
    promote,
    without_ignored,
)
from .budget import clamped, hinge, over_denominator
from .cross_entropy import cross_entropy, label_cross_entropy
from .scaffold import scaffold_mask, temperatures
from .terms import DiSKTerms


def reference_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    guide_logits: Tensor,
    *,
    ce_weight: float = 0.1,
    distill_weight: float = 0.9,
    temperature: float = 4.0,
    student_temperature: float | Tensor | None = None,
    top_k: int | None = None,
    multiplier: float | Tensor = 50.0,
    budget: float | Tensor = 0.3,
    variant: str | Variant = "paper",
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> DiSKTerms:
    r"""Evaluate Kag et al. (ICLR 2023), eq. (5), in plain autograd: slower than ``disk_terms``, easy to change.

    Values and gradients are those of ``disk_terms(..., guide_gradient_scale=None)`` up to rounding, in all variants.
    Student and guide each receive only their own gradient (stop-gradient on the other); double backward is supported.
    The scaled gradient and ``hold_discount`` are left out, as they are not the gradient of any value.

    Args and Shape are those of ``disk_plugin.functional.disk_terms``.

    Raises:
        ValueError: shapes that do not fit, temperatures <= 0, top_k < 1, an unknown variant.
        TypeError: logits not floating-point, or a target that is neither int64 nor floating-point.
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.per_position("guide_logits", guide_logits, student_logits)
    _checks.label_smoothing(label_smoothing)
    _checks.class_weight(weight, student_logits.shape[1])
    _checks.choice("reduction", reduction, REDUCTIONS)
    rules, tau, tau_s = resolve_variant(variant), temperature, temperatures(temperature, student_temperature)
    s, t, guide_logits = promote(student_logits, teacher_logits.detach(), guide_logits)
    where = get_positions(s, target, ignore_index=ignore_index, sample_weight=sample_weight)
    s, t, guide_logits = without_ignored(s, where.masked), without_ignored(t, where.masked), where.plain(guide_logits)
    prediction, teacher_label = s.argmax(1), t.argmax(1)

    # (4): t log(t / (s + g)) over the classes
    mask = scaffold_mask(t, top_k, where.label if rules.scaffold_label else None)
    log_t, target_t = _softened(t / tau, t, mask, rules)
    log_s, log_g = log_softmax(s / tau_s, 1), logsigmoid(guide_logits).unsqueeze(1)

    def distill(log_s: Tensor, log_g: Tensor) -> Tensor:
        scaffolded = torch.where(mask, torch.logaddexp(log_s, log_g), log_s)
        return where.weighted(tau * tau_s * (target_t * (log_t - scaffolded)).sum(1))

    # (3): per position, so that the sum is N (usage - budget)_+
    g, log_probs, classes = guide_logits.sigmoid(), log_softmax(s, 1), min(top_k or s.shape[1], s.shape[1])
    counted_label = teacher_label if rules.budget_label == "teacher" else where.label
    budget_ce = clamped(label_cross_entropy(log_probs, counted_label), rules)
    budget_ce = over_denominator(budget_ce, prediction != where.label, where, rules)
    usage = where.weighted(g * budget_ce).detach()

    def over_budget(g: Tensor, budget_ce: Tensor) -> Tensor:
        return multiplier * hinge(where.weighted(g * budget_ce), where, budget, usage.sum() / where.total, "none")

    # (5), and the halves of student and guide
    ce = where.weighted(cross_entropy(s, target, where.label, weight, label_smoothing))
    to_student = ce_weight * ce + distill_weight * distill(log_s, log_g.detach())
    to_guide = distill_weight * distill(log_s.detach(), log_g)
    penalty = where.weighted(rules.guide_penalty * torch.log1p(classes * g))
    felt_ce = budget_ce if rules.student_feels_budget else budget_ce.detach()
    loss = to_student + (to_guide - to_guide.detach()) + over_budget(g, felt_ce) + penalty
    student_loss = to_student + over_budget(g.detach(), felt_ce) if rules.student_feels_budget else to_student
    guide_loss = to_guide + over_budget(g, budget_ce.detach()) + penalty
    with torch.no_grad():
        kl_to_phi, discount, slope, reach = _watched(log_t, target_t, log_s, log_g, mask)
        ce, divergence = ce.detach(), where.weighted(tau * tau_s * kl_to_phi)
        matches = (prediction == where.label, prediction == teacher_label, teacher_label == where.label)
        correct, agreement, teacher_correct = (where.plain(match.to(s.dtype)) for match in matches)
        terms = DiSKTerms(
            loss=loss,
            student_loss=student_loss,
            guide_loss=guide_loss,
            ce=ce,
            distill=distill(log_s, log_g),
            divergence=divergence,
            logged_loss=ce_weight * ce + distill_weight * divergence,
            usage=usage,
            guide=where.plain(g),
            discount=where.plain(discount),
            correct=correct,
            agreement=agreement,
            teacher_correct=teacher_correct,
            discount_slope=where.plain(slope),
            reach=where.plain(reach),
            counted=where.valid.to(s.dtype),
        )
    reduced = {"mean": terms.mean, "sum": terms.sum}
    return reduced[reduction]() if reduction in reduced else terms


def _softened(scaled: Tensor, teacher_logits: Tensor, mask: Tensor, rules: Variant) -> tuple[Tensor, Tensor]:
    """Return log t and t of the teacher's logits over tau; t is 0 outside the mask if the variant zeroes it there."""
    if rules.teacher_target == "all":
        log_t = log_softmax(scaled, 1)
        return log_t, log_t.exp()
    log_t = log_softmax(torch.where(mask, scaled, teacher_logits.amin(1, keepdim=True)), 1)
    return log_t, log_t.exp() * mask


def _watched(log_t: Tensor, target_t: Tensor, log_s: Tensor, log_g: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Return KL(t || (s + 1[y in K] g) / (1 + K g)), the discount, its derivative w.r.t. log g, and its largest."""
    mass = target_t.sum(1).clamp(min=torch.finfo(target_t.dtype).tiny)
    normaliser = torch.log1p(mask.sum(1) * log_g.exp().squeeze(1))
    scaffolded = torch.where(mask, torch.logaddexp(log_s, log_g), log_s)
    divergence = (target_t * (log_t - scaffolded)).sum(1) + mass * (normaliser - mass.log())
    share = (log_g - log_s).sigmoid() * mask  # g / (s + g)
    removed, slope = (target_t * share).sum(1), (target_t * share * (1 - share)).sum(1)
    return divergence.clamp(min=0), removed / mass, slope / mass, (target_t * mask).sum(1) / mass
