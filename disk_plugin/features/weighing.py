"""How losses per sample become one, weighted by the guide: Kag et al. (ICLR 2023), A.7, eq. (6)."""

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
    """What ``Guided`` and ``guided_feature_terms`` give: scalars, or (N, d1, ...) with ``reduction="none"``.

    ``feature`` and ``logged_loss`` are detached. Of per-sample terms take ``mean()``, which divides by the samples that
    count.
    """

    loss: Tensor  # student_loss + guide_loss
    student_loss: Tensor  # the method's weighted losses [+ DiSK's student half], guide detached
    guide_loss: Tensor  # distill_weight L_dist + multiplier (usage - budget)_+, student detached
    feature: Tensor | None  # w(g) times the method's loss per sample, before its weight; None without a method
    logged_loss: Tensor  # the student's loss with DiSK's logged_loss, >= 0 where the method's is: what to log
    disk: DiSKTerms  # of the student's prediction

    def mean(self) -> "GuidedTerms":
        """Return what ``reduction="mean"`` gives: sums over the samples by the number of those that count."""
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


GuidedFeatureTerms = GuidedTerms  # its first name


def from_disk_terms(terms: DiSKTerms) -> GuidedTerms:
    """Return DiSK's terms, with no method beside them, as terms of the one kind."""
    return GuidedTerms(terms.loss, terms.student_loss, terms.guide_loss, None, terms.logged_loss, terms)


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


class Weighing(NamedTuple):
    """How losses become one."""

    weight: FeatureWeight
    method_weight: float
    logit_loss: bool
    unguided: frozenset[str]


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
