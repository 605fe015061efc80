"""Means over an epoch's training batches, to print and log; some for correct and incorrect samples separately."""

import torch
from torch import Tensor
from torch import distributed as dist

from . import _checks
from .features.guided import GuidedTerms
from .functional import DiSKTerms

_OVER_ALL = ("logged_loss", "ce", "distill", "divergence", "usage", "feature")
# over correct and over incorrect samples
_PARTS = ("guide_right", "guide_wrong", "discount_right", "discount_wrong")
_CONFIDENCE = 2.0  # standard deviations by which one accuracy has to exceed another


class EpochReport:
    """Means over the samples seen since construction, collected on the device and read once.

    Ignored targets do not count. A mean over no sample, such as g on incorrect samples if there are none, is NaN.

    Examples:
        >>> import torch
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> disk, report = DiSKLoss(GuideHead(3)), EpochReport()
        >>> report.add(disk.terms(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 0]), reduction="none"))
        >>> 0 < report.means()["guide_wrong"] < 1, round(report.means()["teacher_accuracy"], 2)
        (True, 0.67)
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._guided = False

    @torch.no_grad()
    def add(self, terms: DiSKTerms | GuidedTerms) -> None:
        """Add a batch's terms, evaluated with ``reduction="none"``; a batch that is not finite is skipped.

        Raises:
            ValueError: terms reduced to scalars.
        """
        disk = terms.disk if isinstance(terms, GuidedTerms) else terms
        if not disk.guide.ndim:
            raise ValueError('terms must be evaluated with reduction="none", one value per sample, got scalars')
        feature = terms.feature if isinstance(terms, GuidedTerms) else None
        self._guided = feature is not None
        right, wrong = disk.correct, disk.counted - disk.correct
        columns = [disk.counted, right, disk.teacher_correct, terms.logged_loss]
        columns += [disk.ce, disk.distill, disk.divergence, disk.usage]
        columns += [torch.zeros_like(right) if feature is None else feature]
        columns += [disk.guide * right, disk.guide * wrong, disk.discount * right, disk.discount * wrong]
        # MPS has no float64
        dtype = torch.float32 if right.device.type == "mps" else torch.float64
        sums = torch.stack([column.sum(dtype=dtype) for column in columns])
        sums = torch.where(sums.isfinite().all(), sums, 0.0)  # single batches may overflow under a loss scaler
        self._sums = sums if self._sums is None else self._sums + sums

    def sum_over_processes(self) -> None:
        """All-reduce (sum) over ranks; each must have added at least one batch."""
        if self._sums is not None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)

    def means(self) -> dict[str, float]:
        """Return the means by name; empty before the first batch.

        Returns:
            ``logged_loss``, ``ce``, ``distill``, ``divergence``, ``usage`` and, with a method, ``feature``, as in
            ``DiSKTerms`` and ``GuidedTerms``; ``guide`` and ``discount`` over correct and incorrect samples
            (``guide_right``, ``guide_wrong``, ...); ``student_accuracy`` and ``teacher_accuracy`` in [0, 1].
        """
        if self._sums is None:
            return {}
        count, right, teacher_right, *sums = self._sums.tolist()
        wrong = count - right
        over = dict.fromkeys(_OVER_ALL, count) | dict(zip(_PARTS, (right, wrong) * 2, strict=True))
        values = dict(zip(over, zip(sums, over.values(), strict=True), strict=True))
        if not self._guided:
            del values["feature"]
        values |= {"student_accuracy": (right, count), "teacher_accuracy": (teacher_right, count)}
        return {name: total / samples if samples else float("nan") for name, (total, samples) in values.items()}

    def weak_teacher(self, num_classes: int, *, beside_student: bool = True) -> str | None:
        """Return a warning if the teacher is at chance or worse than the student, else None.

        That is often the only sign of permuted classes, input normalised for another network or weights that were not
        loaded. Accuracies on the training batches are compared, by two standard deviations. A trained student may be
        ahead of its teacher for good reasons.

        Args:
            num_classes: C, >= 2; chance is 1 / C.
            beside_student: also compare with the student.
        """
        _checks.integer("num_classes", num_classes, at_least=2)
        means = self.means()
        count = self._sums[0].item() if self._sums is not None else 0.0
        if not count:
            return None
        teacher, student, chance = means["teacher_accuracy"], means["student_accuracy"], 1 / num_classes
        noise = _CONFIDENCE / count**0.5
        found = f"the teacher is right on {teacher:.1%} of the {count:.0f} training samples of this epoch"
        check = "check its weights, the order of its classes and how its input is normalised"
        if teacher <= chance + noise * (chance * (1 - chance)) ** 0.5:
            return f"{found}, which cannot be told from chance for {num_classes} classes: {check}"
        if beside_student and student - teacher > noise * (teacher * (1 - teacher) + student * (1 - student)) ** 0.5:
            return f"{found}, the student on {student:.1%}: {check}"
        return None
