"""Gradient accumulation with one hinge for the full batch instead of one per micro-batch."""

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._modes import without_autocast
from ._training_batch import evaluate_batch
from ._watch import warn_if_swapped
from .functional import DiSKTerms
from .loss import DiSKLoss


class AccumulatedBatch:
    """Collects the micro-batches of a batch: each gives the student's half of the loss, all together the guide's.

    Whether the budget is exceeded is known only after the last micro-batch, and it matters to the guide alone. The
    guide's half depends on the student only through its logits. These are kept, and the half is evaluated once on all
    of them, with the gradient of the full batch. The cost is a second evaluation of loss and guide (not of student or
    teacher) and the logits' memory. With ``disk_plugin.distributed.attach`` there is one all-reduce of the guide's
    gradients per step.

    Exact up to rounding if the guide treats samples independently (``norm="layer"``). ``terms`` counts the full batch
    once in the epoch's statistics, and then updates the level of g and a fitted student temperature; the student's
    half, evaluated before, uses the previous ones.

    Args:
        disk: the loss, unwrapped.

    Raises:
        ValueError: a variant whose budget gradient reaches the student; micro-batches with different inputs.
        TypeError: ``disk`` is not a DiSKLoss.
        RuntimeError: ``terms`` before ``add``.

    Examples:
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
                "of the full batch before the last micro-batch is there"
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
        """Return a micro-batch's mean ``student_loss``: scale it by valid elements in the micro-batch / in the batch.

        That is 1 / number of micro-batches if they have equal size and nothing is ignored, else ``(target !=
        ignore_index).sum()`` of the micro-batch over that of the batch. Arguments are those of ``DiSKLoss.forward``;
        they are kept until ``terms`` by reference, so clone a buffer that the next micro-batch overwrites.
        """
        _checks.logits(student_logits, teacher_logits)
        warn_if_swapped(self.disk, student_logits, teacher_logits)
        with torch.no_grad():
            guide_logits = self.disk.guide_logits(teacher_logits, teacher_features, target=target)
        with without_autocast(student_logits):
            inputs = student_logits, teacher_logits, target, guide_logits, sample_weight
            terms = evaluate_batch(self.disk, *inputs, counted=False)  # the full batch is, and is reduced, in terms
        self._keep(
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            target=target,
            teacher_features=teacher_features,
            sample_weight=sample_weight,
        )
        return terms.student_loss

    def terms(self) -> DiSKTerms:
        """Evaluate the micro-batches as one batch and clear them: call ``guide_loss.backward()``, log the rest."""
        if not self._parts:
            raise RuntimeError("terms() needs at least one micro-batch, got none: call add(...) before it")
        joined: dict[str, Any] = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self.clear()
        terms = self.disk.terms(**joined)
        if terms.guide_loss.requires_grad:
            return terms
        # a guide without parameters: backward must still work
        return terms._replace(guide_loss=terms.guide_loss + torch.zeros_like(terms.guide_loss, requires_grad=True))

    def clear(self) -> None:
        """Drop the added micro-batches: call it if a step is skipped, or they join the next batch."""
        self._parts = []

    def _keep(self, **inputs: Tensor | None) -> None:
        part = {name: value.detach() for name, value in inputs.items() if value is not None}
        first = self._parts[0] if self._parts else part
        if part.keys() != first.keys():
            raise ValueError(f"every micro-batch must come with {[*first]} as the first did, got {[*part]}")
        for name, value in part.items():
            if value.shape[1:] != first[name].shape[1:]:
                expected = ("N", *first[name].shape[1:])
                raise ValueError(
                    f"{name} of every micro-batch must have the first's shape ({', '.join(map(str, expected))}), got "
                    f"{tuple(value.shape)}: pad sequences to one length, with ignore_index as their target"
                )
        self._parts.append(part)
