"""What the objective of eq. (5) gives: the loss, its halves and what to watch."""

from typing import NamedTuple

import torch
from torch import Tensor


class DiSKTerms(NamedTuple):
    """What one evaluation of the objective gives: scalars, or (N, d1, ...) with ``reduction="none"``.

    The first three carry gradients, the rest are detached. ``loss`` may be negative and jumps with the multiplier: log
    ``logged_loss``. The sample weight is in all fields up to ``usage``. Of per-position terms take ``mean()``, which
    alone knows the denominator: ``terms.mean().loss.backward()``. Of reduced terms ``mean()`` and ``sum()`` are they
    themselves.
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
    discount_slope: Tensor  # derivative of the discount by log g
    counted: Tensor  # 1 where the position counts, 0 under ignore_index; of reduced terms how many count

    def mean(self) -> "DiSKTerms":
        """Return what ``reduction="mean"`` gives: sums over the positions by the number of those that count."""
        if not self.loss.ndim:
            return self
        carried, watched, count = self._sums()
        total = count.clamp(min=1)
        return DiSKTerms._make([*(value / total for value in carried), *(watched / total).unbind(), count])

    def sum(self) -> "DiSKTerms":
        """Return what ``reduction="sum"`` gives: the mean times the number of positions that count.

        The hinge is no sum: here it is that number times multiplier (usage - budget)_+.
        """
        if not self.loss.ndim:
            return self
        carried, watched, count = self._sums()
        return DiSKTerms._make([*carried, *watched.unbind(), count])

    def _sums(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sum what carries gradients, what does not, as one tensor, and the positions that count."""
        carried = [value.sum() for value in self[:3]]
        return carried, torch.stack(self[3:-1]).flatten(1).sum(1), self.counted.sum()
