"""The result of eq. (5): the loss, its halves and values to monitor."""

from typing import NamedTuple

import torch
from torch import Tensor


class DiSKTerms(NamedTuple):
    """Result of one evaluation of the objective: scalars, or (N, d1, ...) with ``reduction="none"``.

    The first three are differentiable, the rest are detached. Log ``logged_loss``: ``loss`` may be negative and jumps
    with the multiplier. The sample weight is in all fields up to ``usage``. Reduce per-position terms with ``mean()``,
    which has the right denominator: ``terms.mean().loss.backward()``. On reduced terms ``mean()`` and ``sum()`` return
    them unchanged.
    """

    loss: Tensor  # (5); its gradient is that of student_loss on the student and of guide_loss on the guide
    student_loss: Tensor  # ce_weight CE + distill_weight L_dist, guide detached
    guide_loss: Tensor  # distill_weight L_dist + multiplier (usage - budget)_+, student detached
    ce: Tensor  # cross-entropy, nats
    distill: Tensor  # L_dist of (4), nats times tau tau_s
    divergence: Tensor  # tau tau_s KL(t || (s + 1[y in K] g) / (1 + K g)) >= 0: distill plus a constant for the student
    logged_loss: Tensor  # ce_weight ce + distill_weight divergence >= 0; without a guide the loss of plain distillation
    usage: Tensor  # g times the budget's cross-entropy, nats per sample
    guide: Tensor  # g, in [0, 1]
    discount: Tensor  # share of the teacher's pull taken off, in [0, 1]
    correct: Tensor  # 1 where the student's argmax is the label
    agreement: Tensor  # 1 where the student's argmax is the teacher's
    teacher_correct: Tensor  # 1 where the teacher's argmax is the label
    discount_slope: Tensor  # derivative of the discount w.r.t. log g
    counted: Tensor  # 1 at valid positions, 0 at ignored ones; reduced: the number of valid positions

    def mean(self) -> "DiSKTerms":
        """Return the terms of ``reduction="mean"``: sums over positions / the number of valid ones."""
        if not self.loss.ndim:
            return self
        carried, watched, count = self._sums()
        total = count.clamp(min=1)
        return DiSKTerms._make([*(value / total for value in carried), *(watched / total).unbind(), count])

    def sum(self) -> "DiSKTerms":
        """Return the terms of ``reduction="sum"``: the mean times the number of valid positions.

        The hinge is not a sum: here it is that number times multiplier (usage - budget)_+.
        """
        if not self.loss.ndim:
            return self
        carried, watched, count = self._sums()
        return DiSKTerms._make([*carried, *watched.unbind(), count])

    def _sums(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the sums of the differentiable fields, of the detached ones as one tensor, and of valid positions."""
        carried = [value.sum() for value in self[:3]]
        return carried, torch.stack(self[3:-1]).flatten(1).sum(1), self.counted.sum()
