"""Two ways of doing one thing, timed by turns: what drifts on the machine hits both alike."""

import time
from collections.abc import Callable
from typing import NamedTuple

from scipy import stats
from tqdm import trange


class Ratio(NamedTuple):
    """Median of ours / theirs over the pairs, with a distribution-free 95 % interval, and both medians in seconds."""

    median: float
    low: float
    high: float
    ours: float
    theirs: float
    pairs: int


def compare(ours: Callable[[], None], theirs: Callable[[], None], *, pairs: int, warmup: int = 3) -> Ratio:
    """Time the two by turns, first the one and then the other, in an order that alternates from pair to pair."""
    for _ in range(warmup):
        ours()
        theirs()
    times: list[tuple[float, float]] = []
    for pair in trange(pairs, leave=False):
        if pair % 2:
            times.append((_seconds(ours), _seconds(theirs)))
        else:
            second = _seconds(theirs)
            times.append((_seconds(ours), second))
    ratios = [a / b for a, b in times]
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    mine, other = (sorted(column)[pairs // 2] for column in zip(*times, strict=True))
    return Ratio(sorted(ratios)[pairs // 2], float(interval.low), float(interval.high), mine, other, pairs)


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
