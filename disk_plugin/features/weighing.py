"""Losses per sample weighted by the guide and summed: Kag et al. (ICLR 2023), A.7, eq. (6)."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..functional import DiSKTerms
from ..functional._positions import promote

FeatureWeight = Literal["one_minus_guide", "one_minus_discount", "guide", "uniform"]
FEATURE_WEIGHTS: tuple[str, ...] = ("one_minus_guide", "one_minus_discount", "guide", "uniform")


class GuidedTerms(NamedTuple):
    """Result of ``Guided`` and ``guided_feature_terms``: scalars, or (N, d1, ...) with ``reduction="none"``.

    Reduce values per sample with ``mean()``, which divides by the number of non-ignored targets.

    Attributes:
        loss: student_loss + guide_loss.
        student_loss: the method's weighted losses [+ DiSK's student half], guide detached.
        guide_loss: distill_weight L_dist + multiplier (usage - budget)_+, student detached.
        feature: w(g) times the method's loss, before its weight; detached; None without a method.
        logged_loss: what to log: the student's loss with DiSK's logged_loss; detached, >= 0 if the method's losses are.
        disk: DiSK's terms of the prediction.
    """

    loss: Tensor
    student_loss: Tensor
    guide_loss: Tensor
    feature: Tensor | None
    logged_loss: Tensor
    disk: DiSKTerms

    def mean(self) -> "GuidedTerms":
        """Return the terms of ``reduction="mean"``: sums divided by the number of non-ignored targets, at least 1."""
        if not self.loss.ndim:
            return self
        disk = self.disk.mean()
        if self.feature is None:
            return from_disk_terms(disk)
        total = self.disk.counted.sum().clamp(min=1)
        loss, student_loss, guide_loss = (value.sum() / total for value in self[:3])
        return GuidedTerms(
            loss, student_loss, guide_loss, self.feature.sum() / total, self.logged_loss.sum() / total, disk
        )


GuidedFeatureTerms = GuidedTerms  # its previous name


def from_disk_terms(terms: DiSKTerms) -> GuidedTerms:
    """Return DiSK's terms, without a method, as ``GuidedTerms``."""
    return GuidedTerms(terms.loss, terms.student_loss, terms.guide_loss, None, terms.logged_loss, terms)


def feature_weights(terms: DiSKTerms, weight: FeatureWeight) -> Tensor:
    """Return w(g) per sample, detached, in [0, 1]; 0 for ignored targets.

    The paper writes w(g(x)) and reads g near 1 as "discount this sample", hence ``"one_minus_guide"``. A trained g is
    high on easy samples, so ``"one_minus_discount"`` (the share of the teacher's pull that is left) and ``"guide"`` are
    there to compare with. ``"uniform"`` is w = 1, the method itself.

    Args:
        terms: result of ``DiSKLoss.terms(..., reduction="none")``.
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


class Weighing(NamedTuple):
    """The settings of eq. (6)."""

    weight: FeatureWeight
    method_weight: float
    logit_loss: bool
    unguided: frozenset[str]
    scaffolded: frozenset[str] = frozenset()


def weighed(
    terms: DiSKTerms,
    losses: Mapping[str, Tensor],
    student_logits: Tensor,
    sample_weight: Tensor | None,
    how: Weighing,
) -> GuidedTerms:
    """Evaluate eq. (6) per sample."""
    w = feature_weights(terms, how.weight)
    feature = torch.zeros_like(w)
    for name, loss in losses.items():
        if how.logit_loss and name in how.scaffolded:
            continue
        _checks.per_position(name, loss, student_logits)
        (loss,) = promote(loss)
        # masked before the multiplication: 0 times a NaN of an ignored sample is NaN
        loss = torch.where(terms.counted > 0, loss, 0.0)
        feature = feature + (loss if name in how.unguided else w.to(loss.dtype) * loss)
    if sample_weight is not None:
        feature = feature * sample_weight.reshape(*sample_weight.shape, *[1] * (feature.ndim - sample_weight.ndim))
    student_loss = how.method_weight * feature
    logged_loss = student_loss.detach()
    if how.logit_loss:
        student_loss, logged_loss = student_loss + terms.student_loss, logged_loss + terms.logged_loss
    return GuidedTerms(
        student_loss + terms.guide_loss, student_loss, terms.guide_loss, feature.detach(), logged_loss, terms
    )
