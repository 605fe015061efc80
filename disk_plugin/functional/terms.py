"""The result of eq. (5): the loss, its halves and values to monitor."""

from typing import NamedTuple

import torch
from torch import Tensor


class DiSKTerms(NamedTuple):
    """Result of one evaluation of the objective: scalars, or (N, d1, ...) with ``reduction="none"``.

    The first three fields are differentiable, the rest are detached. Log ``logged_loss``: ``loss`` may be negative and
    jumps with the multiplier. The sample weight is in all fields up to ``usage``.

    Reduce values per target with ``mean()``, which has the right denominator: ``terms.mean().loss.backward()``. On
    reduced terms ``mean()`` and ``sum()`` return them unchanged.

    Attributes:
        loss: eq. (5); its gradient is that of student_loss on the student and of guide_loss on the guide.
        student_loss: ce_weight CE + distill_weight L_dist, guide detached.
        guide_loss: distill_weight L_dist + multiplier (usage - budget)_+, student detached.
        ce: cross-entropy, nats.
        distill: L_dist of eq. (4), nats times tau tau_s.
        divergence: tau tau_s KL(t || (s + 1[y in K] g) / (1 + K g)) >= 0; distill plus a constant for the student.
        logged_loss: ce_weight ce + distill_weight divergence >= 0; with g = 0 the loss of plain distillation.
        usage: g times the budget's cross-entropy, nats per sample.
        guide: g, in [0, 1].
        discount: share of the teacher's pull that is taken off, in [0, 1].
        correct: 1 if the student's argmax is the label.
        agreement: 1 if the student's argmax is the teacher's.
        teacher_correct: 1 if the teacher's argmax is the label.
        discount_slope: derivative of the discount w.r.t. log g.
        reach: the largest possible discount: the share of the teacher's pull on the classes that receive g.
        counted: 1 for non-ignored targets, 0 for ignored ones; reduced: the number of non-ignored targets.
    """

    loss: Tensor
    student_loss: Tensor
    guide_loss: Tensor
    ce: Tensor
    distill: Tensor
    divergence: Tensor
    logged_loss: Tensor
    usage: Tensor
    guide: Tensor
    discount: Tensor
    correct: Tensor
    agreement: Tensor
    teacher_correct: Tensor
    discount_slope: Tensor
    reach: Tensor
    counted: Tensor

    def mean(self) -> "DiSKTerms":
        """Return the terms of ``reduction="mean"``: sums divided by the number of non-ignored targets, at least 1."""
        if not self.loss.ndim:
            return self
        carried, watched, count = self._sums()
        total = count.clamp(min=1)
        return DiSKTerms(*[*(value / total for value in carried), *(watched / total).unbind(), count])

    def sum(self) -> "DiSKTerms":
        """Return the terms of ``reduction="sum"``: the mean times the number of non-ignored targets.

        The hinge is not a sum: here it is that number times multiplier (usage - budget)_+.
        """
        if not self.loss.ndim:
            return self
        carried, watched, count = self._sums()
        return DiSKTerms(*[*carried, *watched.unbind(), count])

    def _sums(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the sums of the differentiable fields, of the detached ones as one tensor, and of ``counted``."""
        values = list(self)  # dynamo of torch 2.4 traces neither slices of a NamedTuple nor _make
        carried = [value.sum() for value in values[:3]]
        return carried, torch.stack(values[3:-1]).flatten(1).sum(1), self.counted.sum()
