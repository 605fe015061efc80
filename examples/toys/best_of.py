"""The distribution of the best of n random starts, from the counts of single starts: to interpret Table 1's rows."""

import itertools
import math
from collections.abc import Sequence
from typing import Any


def best_of(counts: Sequence[int], number: int) -> list[float]:
    """Return the percent of cases in which each minimum, the worst first, is the best of ``number`` starts.

    With F the cumulative distribution of one start's minimum, from the worst up, that of the best of n is F ** n.
    """
    below = [0.0, *((reached / sum(counts)) ** number for reached in itertools.accumulate(counts))]
    return [100 * (after - before) for before, after in itertools.pairwise(below)]


def deviance(observed: Sequence[int], expected: Sequence[float]) -> float:
    """Return 2 sum O log(O / E), which is 0 if they agree; inf if E is 0 for an observed minimum."""
    pairs = [(count, mean) for count, mean in zip(observed, expected, strict=True) if count]
    return 2 * sum(count * math.log(count / mean) if mean else math.inf for count, mean in pairs)


def nearest(counts: Sequence[int], observed: Sequence[int], most: int = 200) -> int:
    """Return the n up to ``most`` whose best of n starts is closest to the observed row."""
    return min(range(1, most + 1), key=lambda number: deviance(observed, best_of(counts, number)))


def compare(counts: Sequence[int], observed: Sequence[int], number: int) -> dict[str, Any]:
    """Return prediction and deviance at ``number``, and the n that fits best."""
    predicted = best_of(counts, number)
    found = {"n": number, "predicted": predicted, "observed": list(observed)}
    return {**found, "deviance": deviance(observed, predicted), "nearest_n": nearest(counts, observed)}
