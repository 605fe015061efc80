"""Gradient accumulation with one hinge: that of the full batch, not one per micro-batch."""

from typing import Any

import torch
from torch import Tensor

from ._watch import warn_if_swapped
from .functional import DiSKTerms
from .loss import DiSKLoss


class AccumulatedBatch:
    """The micro-batches that together are one batch: each gives the student's half, all together the guide's.

    Whether the budget is exceeded is known only after the last micro-batch, and only the guide has to know. Its half
    needs no more of the student than the logits, which are kept: it is evaluated once, on all of them, and its gradient
    is the full batch's. (The student's half is a sum over samples and needs no such care.) That costs a second
    evaluation of loss and guide, neither of student nor teacher, and the logits' memory; under
    :func:`disk_plugin.distributed.attach` it is one average of the guide's gradients per step.

    Exact up to rounding where the guide treats samples one by one (``norm="layer"``). Epoch statistics count the whole
    once, in ``terms``; there too the level of g and a fitted student temperature move, after the student's half, not
    before it.

    Args:
        disk: the loss.

    Raises:
        ValueError: a variant whose student feels the budget, and so the hinge; micro-batches with different inputs.
        TypeError: ``disk`` is not a DiSKLoss.
        RuntimeError: ``terms`` before ``add``.

    Example:
        >>> import torch
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> whole = AccumulatedBatch(DiSKLoss(GuideHead(num_classes=10)))
        >>> for student_logits in torch.randn(2, 4, 10, requires_grad=True):
        ...     (whole.add(student_logits, torch.randn(4, 10), torch.tensor([1, 2, 3, 4])) / 2).backward()
        >>> whole.terms().guide_loss.backward()
    """

    def __init__(self, disk: DiSKLoss) -> None:
        if not isinstance(disk, DiSKLoss):
            raise TypeError(f"disk must be a DiSKLoss (not a wrapper around it), got {type(disk).__name__}")
        if disk.variant.student_feels_budget:
            raise ValueError(
                "disk.variant.student_feels_budget must be False, got True: such a student's gradient needs the hinge "
                "of the whole batch before the last micro-batch is there"
            )
        self.disk = disk
        self._parts: list[dict[str, Tensor]] = []

    def add(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        teacher_features: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return ``student_loss`` of a micro-batch, a mean over it: scale it by valid elements in it / in the batch.

        That is 1 / number of micro-batches where they are of one size and nothing is ignored, else
        ``(target != ignore_index).sum()`` over the same for the whole batch.
        """
        warn_if_swapped(self.disk, student_logits, teacher_logits)
        with torch.no_grad():
            guide_logits = self.disk.guide_logits(teacher_logits, teacher_features, target=target)
        training, self.disk.training = self.disk.training, False  # the whole is counted, and shared, in terms
        try:
            terms = self.disk.terms(
                student_logits, teacher_logits, target, guide_logits=guide_logits, sample_weight=sample_weight
            )
        finally:
            self.disk.training = training
        self._keep(
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            target=target,
            teacher_features=teacher_features,
            sample_weight=sample_weight,
        )
        return terms.student_loss

    def terms(self) -> DiSKTerms:
        """Evaluate what was added as one batch and forget it: call ``guide_loss.backward()``, log the rest."""
        if not self._parts:
            raise RuntimeError("terms() needs at least one micro-batch, got none: call add(...) before it")
        joined: dict[str, Any] = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self.clear()
        terms = self.disk.terms(**joined)
        if terms.guide_loss.requires_grad:
            return terms
        # of a guide without parameters: its backward is to be called all the same
        return terms._replace(guide_loss=terms.guide_loss + torch.zeros_like(terms.guide_loss, requires_grad=True))

    def clear(self) -> None:
        """Forget what was added: call it where a step is skipped, or its micro-batches join the next batch."""
        self._parts = []

    def _keep(self, **inputs: Tensor | None) -> None:
        part = {name: value.detach() for name, value in inputs.items() if value is not None}
        if self._parts and part.keys() != self._parts[0].keys():
            raise ValueError(f"every micro-batch must come with {[*self._parts[0]]} as the first did, got {[*part]}")
        self._parts.append(part)
