"""Equation (1): plain knowledge distillation."""

from torch import Tensor
from torch.nn.functional import log_softmax

from .. import _checks
from ._positions import (
    REDUCTIONS,
    Reduction,
    get_positions,
    promote,
    to_dtype,
    without_ignored,
)
from .cross_entropy import cross_entropy
from .scaffold import temperatures


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    ce_weight: float = 0.1,
    distill_weight: float = 0.9,
    temperature: float = 4.0,
    student_temperature: float | Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return plain knowledge distillation, Kag et al. (ICLR 2023), eq. (1): DiSK with g = 0.

    $$\alpha\, CE(s) + (1-\alpha)\, \tau\tau_s\, \frac1N \sum_i KL(t^\tau \| s^{\tau_s})$$

    Args:
        student_logits: before softmax.
        teacher_logits: before softmax; no gradient reaches them. An infinite one gives NaN: mask a class by -1e4.
        target: class indices, or probabilities of the logits' shape.
        ce_weight: weight of the cross-entropy, >= 0 (paper: alpha).
        distill_weight: weight of the divergence, >= 0 (paper: 1 - alpha).
        temperature: divides the teacher's logits, dimensionless, > 0.
        student_temperature: divides the student's logits, > 0; None for ``temperature``.
        ignore_index: target value that is ignored and does not contribute to the gradient.
        weight: weight of each class in the cross-entropy, (C,); None for 1. The mean still divides by the number of
            non-ignored targets, in ``F.cross_entropy`` by the sum of their weights.
        label_smoothing: smoothing of the cross-entropy, in [0, 1), as in ``F.cross_entropy``.
        sample_weight: weight per sample or target; the mean still divides by the number of non-ignored targets.
        reduction: ``"mean"`` over the non-ignored targets, ``"sum"`` or ``"none"``.

    Shape:
        logits (N, C) or (N, C, d1, ...); target (N, d1, ...) or the logits'; sample_weight (N,) or (N, d1, ...);
        returns a scalar, or (N, d1, ...) with 0 for ignored targets.

    Raises:
        ValueError: shapes that do not fit, values out of range.
        TypeError: logits not floating-point, or a target that is neither int64 nor floating-point.
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.number("ce_weight", ce_weight, at_least=0)
    _checks.number("distill_weight", distill_weight, at_least=0)
    _checks.label_smoothing(label_smoothing)
    _checks.class_weight(weight, student_logits.shape[1])
    _checks.choice("reduction", reduction, REDUCTIONS)
    tau_s = temperatures(temperature, student_temperature)
    s, t = promote(student_logits, teacher_logits.detach())
    where = get_positions(s, target, ignore_index=ignore_index, sample_weight=sample_weight)
    s, t = without_ignored(s, where.masked), without_ignored(t, where.masked)
    ce = cross_entropy(s, target, where.label, weight, label_smoothing)
    log_t = log_softmax(t / temperature, 1)
    kl = (log_t.exp() * (log_t - log_softmax(s / tau_s, 1))).sum(1)
    distill = temperature * to_dtype(tau_s, s.dtype) * kl
    return where.reduce(where.weighted(ce_weight * ce + distill_weight * distill), reduction)
