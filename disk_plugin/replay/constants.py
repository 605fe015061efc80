"""What the guide's half of eq. (5) needs from teacher and student, as constants, and the guide's loss from it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from ..functional._positions import Positions, by_position, get_positions, promote, to_dtype
from ..functional._settings import Settings
from ..functional.blocks import softened_teacher, with_guide
from ..functional.budget import clamped, over_denominator
from ..functional.cross_entropy import label_cross_entropy
from ..functional.guide_half import StudentSide, guide_half
from ..functional.scaffold import mask_and_size


class GuideConstants(NamedTuple):
    """What the guide's half of (5) needs from teacher and student, for M positions; detached."""

    target: Tensor  # t_k of the K scaffolded classes, (M, K); padded with 0
    log_student: Tensor  # log s_k of these, (M, K)
    offset: Tensor  # independent of g: sum_y t_y log t_y - sum_(y not in K) t_y log s_y, nats, (M,)
    budget_ce: Tensor  # the budget's cross-entropy, nats, (M,); its denominator is a batch's
    wrong: Tensor  # bool, (M,): the student's argmax is not the label
    factor: Tensor  # tau tau_s, (M,)
    weight: Tensor  # sample weight, (M,)
    valid: Tensor  # bool, (M,): not under ignore_index


@torch.no_grad()
def guide_constants(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    settings: Settings,
    sample_weight: Tensor | None = None,
) -> GuideConstants:
    """Return the constants of M = N d1 ... positions; arguments are those of ``disk_terms``."""
    temperature, top_k, variant = settings.temperature, settings.top_k, settings.variant
    s, t = promote(student_logits, teacher_logits)
    tau_s = to_dtype(settings.student_temperature, s.dtype)
    where = get_positions(s, target, ignore_index=settings.ignore_index, sample_weight=sample_weight)
    mask, _ = mask_and_size(t, top_k, where.label if variant.scaffold_label else None)
    s, t = by_position(s), by_position(t)
    label = where.label.flatten()
    mask = None if mask is None else by_position(mask)
    log_t, target_t = softened_teacher(t, mask, temperature, variant.teacher_target == "scaffolded")
    log_s = log_softmax(s / tau_s, 1)
    offset = (target_t * log_t).sum(1)
    if mask is not None and top_k is not None:
        offset = offset - torch.where(mask, 0.0, target_t * log_s).sum(1)
        ids = mask.to(s.dtype).topk(min(top_k + variant.scaffold_label, s.shape[1]), 1).indices
        inside = mask.gather(1, ids)  # one class fewer if the label is among the top-K
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


def guide_loss(constants: GuideConstants, guide_logits: Tensor, settings: Settings) -> Tensor:
    """Return ``disk_terms(...).guide_loss`` of a batch of positions from its constants and guide logits (M,)."""
    guide_logits, offset = promote(guide_logits, constants.offset)
    valid, factor, distill_weight = constants.valid, constants.factor, settings.distill_weight
    total = valid.sum().clamp(min=1).to(offset.dtype)
    where = Positions(valid.long(), valid, constants.weight, total)  # no label is read
    log_g = logsigmoid(guide_logits.detach()).unsqueeze(1)
    scaffolded, share, kept = with_guide(constants.log_student, log_g)
    kl, taken = offset - (constants.target * scaffolded).sum(1), constants.target * share
    slope = (taken * kept).sum(1)
    if settings.variant.teacher_target == "scaffolded":  # else the whole target, of which K classes are kept, sums to 1
        slope = slope / constants.target.sum(1).clamp(min=torch.finfo(slope.dtype).tiny)
    student = StudentSide(
        removed=taken.sum(1),
        slope=slope,
        budget_ce=over_denominator(constants.budget_ce, constants.wrong, where, settings.variant, settings.reduce_mean),
        factor=factor,
        classes=settings.scaffolded(constants.target.shape[1]),
    )
    half = guide_half(guide_logits, student, where, settings, "mean")
    distill = where.reduce(distill_weight * where.weighted(factor * kl), "mean")
    return distill + half.over_budget + half.penalty + half.gradient
