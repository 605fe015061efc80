"""What an epoch's training batches showed of DiSK: means for the host's progress line, TensorBoard and worklog."""

import torch
from torch import Tensor

from disk_plugin.features.guided import GuidedFeatureTerms
from disk_plugin.functional import DiSKTerms


class EpochReport:
    """Means over the samples seen since construction, collected on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._guided = False

    @torch.no_grad()
    def add(self, terms: DiSKTerms | GuidedFeatureTerms) -> None:
        """Add a batch's per-sample terms."""
        self._guided = isinstance(terms, GuidedFeatureTerms)
        disk = terms.disk if isinstance(terms, GuidedFeatureTerms) else terms
        right = disk.correct
        columns = [torch.ones_like(right), right, disk.ce, disk.distill, disk.usage]
        columns += [disk.guide * right, disk.guide * (1 - right), disk.discount * right, disk.discount * (1 - right)]
        columns += [terms.feature if isinstance(terms, GuidedFeatureTerms) else torch.zeros_like(right)]
        sums = torch.stack([column.double().sum() for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums

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
