"""Differences of paired runs: mean and t-interval."""

import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats


def paired(gap: Sequence[float]) -> dict[str, Any]:
    """Return the mean of differences and its 95 % t-interval, None for a single one."""
    mean, interval = statistics.fmean(gap), None
    if len(gap) > 1:
        half = stats.t.ppf(0.975, len(gap) - 1) * statistics.stdev(gap) / len(gap) ** 0.5
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval_95": interval, "values": list(gap)}


def shown_difference(gap: dict[str, Any] | None) -> str:
    """Return a paired difference as a cell."""
    if not gap:
        return ""
    if gap["interval_95"] is None:
        return f"{gap['mean']:+.2f} (one seed)"
    return f"{gap['mean']:+.2f} ({gap['interval_95'][0]:+.2f} to {gap['interval_95'][1]:+.2f})"
