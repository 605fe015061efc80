"""The rule derived from the map: the smallest capacity gap and the largest data gap at which to use DiSK."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .arms import ARMS
from .cells import gain

ARM = next(iter(ARMS))  # the rule is about its gain
MARGIN = 0.5  # points of accuracy: smaller gains and losses are ignored
CAPACITY_GRID = tuple(range(5, 65, 5))
DATA_GRID = (*range(5, 45, 5), 100)


class Point(NamedTuple):
    """A cell of the map: its two gaps and DiSK's gain over KD, in percent points."""

    name: str
    problem: str
    synthetic: bool
    capacity: float
    data: float
    gain: float
    error: float  # standard error of the gain over the seeds


class Rule(NamedTuple):
    """Use DiSK if the capacity gap is at least, and the data gap at most this, in percent points."""

    capacity: float
    data: float

    def __call__(self, point: Point) -> bool:
        """Whether DiSK is recommended."""
        return point.capacity >= self.capacity and point.data <= self.data


class Score(NamedTuple):
    """Counts of cells with a gain or loss above the margin, by recommendation."""

    clear: int
    right: int
    gains_missed: int
    losses_taken: int
    mean_gain: float  # over the cells with DiSK recommended
    recommended: int


def points(results: dict[str, Any], arm: str = ARM) -> list[Point]:
    """Read the cells of a stored map."""
    found = []
    for key, problem in results["problems"].items():
        for cell in problem["cells"]:
            gains = gain(cell, arm)
            look = {name: mean(cell[name]) for name in ("teacher_train", "student_train", "student_held_out")}
            found.append(
                Point(
                    f"{key}, width {cell['width']}",
                    key,
                    "clusters" in cell["problem"],
                    look["teacher_train"] - look["student_train"],
                    look["student_train"] - look["student_held_out"],
                    mean(gains),
                    (sum((each - mean(gains)) ** 2 for each in gains) / max(len(gains) - 1, 1) / len(gains)) ** 0.5,
                )
            )
    return found


def derive(cells: Iterable[Point]) -> Rule:
    """Choose the thresholds with the largest total gain beyond the margin, over synthetic cells with DiSK recommended.

    Rules within one margin of the best are ties: take the middle one of their capacity gaps, then the smallest, most
    cautious data gap. The real problems are not used: they test the rule.
    """
    cells = [cell for cell in cells if cell.synthetic]
    worth = {rule: _worth(rule, cells) for rule in map(Rule._make, itertools.product(CAPACITY_GRID, DATA_GRID))}
    good = [rule for rule, value in worth.items() if value >= max(worth.values()) - MARGIN]
    capacity = statistics.median_low(sorted({rule.capacity for rule in good}))
    return min((rule for rule in good if rule.capacity == capacity), key=lambda rule: rule.data)


def score(cells: Iterable[Point], said: Iterable[bool]) -> Score:
    """Compare recommendations with outcomes."""
    pairs = list(zip(cells, said, strict=True))
    clear = [(cell.gain > 0, take) for cell, take in pairs if abs(cell.gain) > MARGIN]
    taken = [cell.gain for cell, take in pairs if take]
    return Score(
        len(clear),
        sum(better == take for better, take in clear),
        sum(better and not take for better, take in clear),
        sum(take and not better for better, take in clear),
        mean(taken) if taken else 0.0,
        len(taken),
    )


def left_out(cells: Sequence[Point]) -> Score:
    """Cross-validate: score the rule on each synthetic problem with thresholds derived from the others."""
    cells = [cell for cell in cells if cell.synthetic]
    rules = {name: derive(cell for cell in cells if cell.problem != name) for name in {c.problem for c in cells}}
    return score(cells, [rules[cell.problem](cell) for cell in cells])


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _worth(rule: Rule, cells: Iterable[Point]) -> float:
    return sum(cell.gain - MARGIN for cell in cells if rule(cell))
