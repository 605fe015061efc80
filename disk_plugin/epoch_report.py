"""What an epoch's training batches showed of DiSK: means to print and log, right and wrong samples apart."""

import torch
from torch import Tensor
from torch import distributed as dist

from .features.guided import GuidedFeatureTerms
from .functional import DiSKTerms


class EpochReport:
    """Means over the samples seen since construction, collected on the device and read once.

    Example:
        >>> import torch
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> disk, report = DiSKLoss(GuideHead(3)), EpochReport()
        >>> report.add(disk.terms(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 0]), reduction="none"))
        >>> 0 < report.means()["guide_wrong"] < 1
        True
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._guided = False

    @torch.no_grad()
    def add(self, terms: DiSKTerms | GuidedFeatureTerms) -> None:
        """Add a batch's terms, evaluated with ``reduction="none"``."""
        self._guided = isinstance(terms, GuidedFeatureTerms)
        disk = terms.disk if isinstance(terms, GuidedFeatureTerms) else terms
        right = disk.correct
        columns = [torch.ones_like(right), right, disk.ce, disk.distill, disk.usage]
        columns += [disk.guide * right, disk.guide * (1 - right), disk.discount * right, disk.discount * (1 - right)]
        columns += [terms.feature if isinstance(terms, GuidedFeatureTerms) else torch.zeros_like(right)]
        # MPS has no float64
        dtype = torch.float32 if right.device.type == "mps" else torch.float64
        sums = torch.stack([column.sum(dtype=dtype) for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums

    def sum_over_processes(self) -> None:
        """Add up what all processes saw; each of them must have seen at least one batch."""
        if self._sums is not None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)

    def means(self) -> dict[str, float]:
        """Return the means by name; those over right (or wrong) samples are NaN where there is none."""
        if self._sums is None:
            return {}
        count, right, ce, distill, usage, *parts, feature = self._sums.tolist()
        wrong = count - right
        names = ("guide_right", "guide_wrong", "discount_right", "discount_wrong")
        counts = (right, wrong, right, wrong)
        values = {"ce": ce / count, "distill": distill / count, "usage": usage / count}
        if self._guided:
            values["feature"] = feature / count
        for name, part, over in zip(names, parts, counts, strict=True):
            values[name] = part / over if over else float("nan")
        return values
