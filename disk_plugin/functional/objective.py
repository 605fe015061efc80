"""Equation (5): the objective, its two halves and values to monitor.

``evaluate`` is one long function because it evaluates each (N, C) quantity once, for all of them.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .. import _checks
from ..variants import Variant, resolve_variant
from ._positions import (
    REDUCTIONS,
    Reduction,
    get_positions,
    promote,
    to_dtype,
    without_ignored,
)
from ._settings import Settings
from .budget import clamped, over_denominator
from .cross_entropy import cross_entropy, label_cross_entropy
from .guide_half import StudentSide, guide_half
from .scaffold import get_discount, get_discount_slope, get_divergence, get_reach, mask_and_size, scaffold
from .terms import DiSKTerms


def disk_terms(
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
    guide_gradient_scale: float | None = 0.3,
    hold_discount: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    reduce_mean: Callable[[Tensor], Tensor] | None = None,
    reduction: Reduction = "mean",
) -> DiSKTerms:
    r"""Evaluate the objective of DiSK, Kag et al. (ICLR 2023), eq. (5), for given guide logits.

    $$\alpha\,L_{CE}(s) + (1-\alpha)\,L_{dist}(s, g) + \lambda\,\Big(\tfrac1N\sum_i g_i CE_i - \delta\Big)_+$$

    In one backward through ``loss``, student and guide each receive only their own gradient (stop-gradient on the
    other): the student that of CE and scaffold, the guide that of scaffold and budget. (Algorithm 1: "not optimizing
    the student model on budget loss gives more stable results".) The default is the paper's;
    ``disk_plugin.variants.Variant`` lists where the authors' scripts differ.

    Double backward is not supported, as gradients are in closed form. For that, or to read and fork the method, use
    ``disk_plugin.functional.reference_terms``, the same in plain autograd.

    The hinge is over the batch of this call. Micro-batches and replicas each have their own unless ``reduce_mean``
    averages over them.

    Args:
        student_logits: before softmax.
        teacher_logits: before softmax; no gradient reaches them.
        target: class indices, or probabilities of the logits' shape (soft cross-entropy; the label is the argmax).
        guide_logits: the guide before its sigmoid.
        ce_weight: weight of the cross-entropy, >= 0 (paper: alpha).
        distill_weight: weight of the scaffolded divergence, >= 0 (paper: 1 - alpha).
        temperature: divides the teacher's logits, dimensionless, > 0 (paper: tau).
        student_temperature: divides the student's logits, > 0; None for ``temperature`` (paper: tau_s).
        top_k: number of the teacher's largest classes that receive g, >= 1; None for all (paper: K).
        multiplier: weight of the budget's hinge, >= 0 (paper: lambda).
        budget: nats per sample, >= 0 (paper: delta).
        variant: ``"paper"``, ``"official_cifar"``, ``"official_imagenet"`` or a ``Variant``.
        guide_gradient_scale: c > 0, which keeps the guide alive under the student's optimizer: its logit receives
            c / (4 (tau tau_s + multiplier)) times the gradient w.r.t. g, and for g outside [.0009, .953] a linear
            restoring force. Values, and each sample's optimum in that range, are unchanged. None: the gradient w.r.t.
            the logit, as in the paper.
        hold_discount: instead of under the budget, the guide minimises L_dist at a fixed mean discount, which the
            caller keeps (not in the paper). The guide's logit receives the gradient of the Lagrangian, whose mean over
            the batch is 0; ``multiplier``, ``budget`` and the variant's rules of the budget are not read.
        ignore_index: target value that is ignored and does not contribute to any gradient, whatever inputs hold there.
        weight: weight of each class in the cross-entropy, (C,); None for 1. Means still divide by the number of
            non-ignored targets, in ``F.cross_entropy`` by the sum of their weights. Scaffold, budget and so the guide
            do not depend on it.
        label_smoothing: smoothing of the cross-entropy alone, in [0, 1), as in ``F.cross_entropy``.
        sample_weight: weight per sample or target; means still divide by the number of non-ignored targets.
        reduce_mean: averages a detached scalar over the parts of the full batch (ranks, micro-batches), whose usage
            then decides whether the budget is exceeded. None if this is the full batch.
        reduction: ``"none"`` for values per target, ``"mean"`` for their ``mean()``, ``"sum"`` for their ``sum()``.

    Shape:
        logits (N, C) or (N, C, d1, ...); target (N, d1, ...) or the logits'; guide_logits (N,) or (N, d1, ...);
        sample_weight (N,) or (N, d1, ...). Returns scalars, or (N, d1, ...) with ``"none"``.

    Returns:
        The loss, its halves and values to monitor, see ``DiSKTerms``.

    Raises:
        ValueError: shapes that do not fit, values out of range, an unknown variant.
        TypeError: logits not floating-point, or a target that is neither int64 nor floating-point.
    """
    settings = Settings(
        ce_weight=ce_weight,
        distill_weight=distill_weight,
        temperature=temperature,
        student_temperature=temperature if student_temperature is None else student_temperature,
        top_k=top_k,
        multiplier=multiplier,
        budget=budget,
        variant=resolve_variant(variant),
        guide_gradient_scale=guide_gradient_scale,
        hold_discount=hold_discount,
        ignore_index=ignore_index,
        weight=weight,
        label_smoothing=label_smoothing,
        reduce_mean=reduce_mean,
    ).checked()
    _checks.logits(student_logits, teacher_logits)
    _checks.choice("reduction", reduction, REDUCTIONS)
    per_position = reduction != "mean"
    terms = evaluate(student_logits, teacher_logits, target, guide_logits, settings, sample_weight, per_position)
    return terms.sum() if reduction == "sum" else terms


def evaluate(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    guide_logits: Tensor,
    settings: Settings,
    sample_weight: Tensor | None,
    per_position: bool,
) -> DiSKTerms:
    """Evaluate ``disk_terms`` for validated settings and logits."""
    _checks.per_position("guide_logits", guide_logits, student_logits)
    _checks.class_weight(settings.weight, student_logits.shape[1])
    reduction: Literal["mean", "none"] = "none" if per_position else "mean"
    temperature, distill_weight, variant = settings.temperature, settings.distill_weight, settings.variant
    s, t, guide_logits = promote(student_logits, teacher_logits.detach(), guide_logits)
    tau_s = to_dtype(settings.student_temperature, s.dtype)
    where = get_positions(s, target, ignore_index=settings.ignore_index, sample_weight=sample_weight)
    guide_logits = where.plain(guide_logits)
    teacher_label = t.argmax(1)
    # whether the cross-entropy is one that ``rows`` does not evaluate
    own_ce = target.is_floating_point() or settings.weight is not None or settings.label_smoothing != 0
    budget_label = teacher_label if variant.budget_label == "teacher" else where.label
    mask, size = mask_and_size(t, settings.top_k, where.label if variant.scaffold_label else None)
    parts = scaffold(
        s,
        t,
        guide_logits.detach(),
        torch.stack([where.label, budget_label], 1),
        mask,
        where.masked,
        temperature=temperature,
        student_temperature=tau_s,
        ce_weight=0.0 if own_ce else settings.ce_weight,
        distill_weight=distill_weight,
        teacher_target=variant.teacher_target,
    )
    ce, core = parts.ce[..., 0], parts.objective
    if own_ce:
        known = without_ignored(s, where.masked)
        ce = cross_entropy(known, target, where.label, settings.weight, settings.label_smoothing)
        core = core + settings.ce_weight * ce
    ce, distill = ce.detach(), temperature * tau_s * parts.kl
    budget_ce = parts.ce[..., 1]
    if variant.student_feels_budget:
        budget_ce = label_cross_entropy(log_softmax(without_ignored(s, where.masked), 1), budget_label)
    budget_ce = clamped(budget_ce, variant)
    budget_ce = over_denominator(budget_ce, parts.prediction != where.label, where, variant, settings.reduce_mean)

    # the student's half: the guide is detached
    core = where.reduce(where.weighted(core), reduction)
    slope, classes = get_discount_slope(parts), settings.scaffolded(s.shape[1])
    student = StudentSide(parts.removed, slope, budget_ce, temperature * tau_s, classes)
    half = guide_half(guide_logits, student, where, settings, reduction)
    divergence = temperature * tau_s * get_divergence(parts, half.guide, size)
    weighted = [*(value * where.weight for value in (ce, distill, divergence)), half.spent.detach()]
    matches = (parts.prediction == where.label, parts.prediction == teacher_label, teacher_label == where.label)
    plain = [half.guide, get_discount(parts), *(match.to(s.dtype) for match in matches), slope, get_reach(parts)]
    ce, distill, divergence, usage, guide, discount, correct, agreement, teacher_correct, discount_slope, reach = (
        where.reduce_each([*weighted, *plain], reduction)
    )
    counted = where.valid if reduction == "none" else where.valid.sum()
    return DiSKTerms(
        loss=core + half.over_budget + half.penalty + half.gradient,
        student_loss=core + half.over_budget if variant.student_feels_budget else core,
        guide_loss=distill_weight * distill + half.over_budget.detach() + half.penalty + half.gradient,
        ce=ce,
        distill=distill,
        divergence=divergence,
        logged_loss=settings.ce_weight * ce + distill_weight * divergence,
        usage=usage,
        guide=guide,
        discount=discount,
        correct=correct,
        agreement=agreement,
        teacher_correct=teacher_correct,
        discount_slope=discount_slope,
        reach=reach,
        counted=counted.to(s.dtype),
    )


def disk_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, guide_logits: Tensor, **settings: object
) -> Tensor:
    """Return ``disk_terms(...).loss``, Kag et al. (ICLR 2023), eq. (5); ``settings`` are those of ``disk_terms``."""
    return disk_terms(student_logits, teacher_logits, target, guide_logits, **settings).loss  # type: ignore[arg-type]
