"""Feature matching weighted by the guide: Kag et al. (ICLR 2023), A.7, the same for every feature-matching method."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..functional import DiSKTerms
from ..functional._positions import promote
from ..loss import DiSKLoss

FeatureWeight = Literal["one_minus_guide", "one_minus_discount", "guide", "uniform"]
FEATURE_WEIGHTS: tuple[str, ...] = ("one_minus_guide", "one_minus_discount", "guide", "uniform")


class GuidedFeatureTerms(NamedTuple):
    """What :func:`guided_feature_terms` gives: scalars, or (N, d1, ...) with ``reduction="none"``.

    ``feature`` and ``logged_loss`` are detached. Of per-sample terms take ``mean()``, which divides by the samples that
    count.
    """

    loss: Tensor  # student_loss + guide_loss
    student_loss: Tensor  # feature_weight w(g) ||Psi f_S - f_T||^2 [+ DiSK's student half], guide detached
    guide_loss: Tensor  # distill_weight L_dist + multiplier (usage - budget)_+, student detached
    feature: Tensor  # w(g) ||Psi f_S - f_T||^2, before feature_weight
    logged_loss: Tensor  # feature_weight feature [+ DiSK's logged_loss] >= 0: what to log
    disk: DiSKTerms  # of the student's prediction

    def mean(self) -> "GuidedFeatureTerms":
        """Return what ``reduction="mean"`` gives: sums over the samples by the number of those that count."""
        if not self.loss.ndim:
            return self
        total = self.disk.counted.sum().clamp(min=1)
        loss, student_loss, guide_loss, feature, logged = (value.sum() / total for value in self[:5])
        return GuidedFeatureTerms(loss, student_loss, guide_loss, feature, logged, self.disk.mean())


def feature_weights(terms: DiSKTerms, weight: FeatureWeight) -> Tensor:
    """Return w(g) per sample, detached, in [0, 1]; 0 where a sample is ignored.

    The paper writes w(g(x)) and reads g near 1 as "discount this sample", hence ``"one_minus_guide"``. As a trained g
    is high on easy samples, ``"one_minus_discount"`` (the share of the teacher's pull that is left) and ``"guide"``
    are there to compare; ``"uniform"`` is w = 1, the host method itself.

    Args:
        terms: of ``DiSKLoss.terms(..., reduction="none")``.
        weight: one of ``FEATURE_WEIGHTS``.

    Raises:
        ValueError: an unknown ``weight``, terms reduced to scalars.
    """
    _checks.choice("weight", weight, FEATURE_WEIGHTS)
    if not terms.guide.ndim:
        raise ValueError('terms must be evaluated with reduction="none", one value per sample, got scalars')
    if weight == "one_minus_guide":
        return terms.counted - terms.guide
    if weight == "one_minus_discount":
        return terms.counted - terms.discount
    return terms.guide if weight == "guide" else terms.counted


def guided_feature_terms(
    disk: DiSKLoss,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    teacher_features: Tensor | None,
    feature_error: Tensor,
    *,
    weight: FeatureWeight = "one_minus_guide",
    feature_weight: float = 1.0,
    logit_loss: bool = False,
    guide_logits: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> GuidedFeatureTerms:
    r"""Evaluate a feature-matching loss weighted by the guide: Kag et al. (ICLR 2023), A.7, eq. (6).

    .. math:: \beta\,\tfrac1N\sum_i w(g(x_i))\,\|\Psi(f_S(x_i)) - f_T(x_i)\|^2

    normalised by N, not by the sum of w. Student and connector Psi feel this term, with g held fixed, and DiSK's own
    student half if ``logit_loss``. The guide feels the scaffold and the budget of eq. (5), with the student held fixed,
    and **not** the feature term, which would push g to where w = 0 for free. With ``"uniform"``, or wherever w = 1, the
    student's gradient is that of the feature-matching method itself, bit for bit.

    Args:
        disk: the loss that owns the guide.
        student_logits: the prediction that inference will use (of SimKD: the teacher's classifier on Psi f_S).
        teacher_logits: before softmax.
        target: class indices or probabilities.
        teacher_features: what the guide reads beside the logits, or None.
        feature_error: squared distance per sample, already a mean over its elements; half types become float32.
        weight: which w, see :func:`feature_weights`.
        feature_weight: beta, >= 0.
        logit_loss: add ce_weight CE + distill_weight L_dist of ``student_logits`` to the student's loss.
        guide_logits: what ``disk.guide_logits`` gave, where that has to be called elsewhere (see ``DiSKLoss.terms``).
        reduction: ``"mean"`` over the samples that are not ignored, or ``"none"``.

    Shape:
        logits (N, C) or (N, C, d1, ...); target (N, d1, ...) or the logits'; teacher_features (N, D) or
        (N, D, d1, ...); feature_error (N,) or (N, d1, ...).

    Raises:
        ValueError: an unknown ``weight``, shapes that do not fit, ``feature_weight`` < 0.
        TypeError: ``disk`` is not a ``DiSKLoss``.
    """
    if not isinstance(disk, DiSKLoss):
        raise TypeError(f"disk must be a DiSKLoss, got {type(disk).__name__}")
    _checks.number("feature_weight", feature_weight, at_least=0)
    _checks.choice("reduction", reduction, ("mean", "none"))
    terms = disk.terms(
        student_logits, teacher_logits, target, teacher_features, guide_logits=guide_logits, reduction="none"
    )
    _checks.per_position("feature_error", feature_error, student_logits)
    (error,) = promote(feature_error)
    # masked before the multiplication: 0 times a NaN of an ignored sample is NaN
    feature = feature_weights(terms, weight).to(error.dtype) * torch.where(terms.counted > 0, error, 0.0)
    student_loss = feature_weight * feature
    logged_loss = student_loss.detach()
    if logit_loss:
        student_loss, logged_loss = student_loss + terms.student_loss, logged_loss + terms.logged_loss
    loss = student_loss + terms.guide_loss
    found = GuidedFeatureTerms(loss, student_loss, terms.guide_loss, feature.detach(), logged_loss, terms)
    return found.mean() if reduction == "mean" else found
