"""The examples' own figures: what their arithmetic gives, and that documents repeat the committed results."""

import json
from pathlib import Path

import guide_health
import pytest
import quickstart
import scaffold_target
from evidence import shown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"


def committed(name):
    return json.loads((RESULTS / name).read_text())


@pytest.mark.parametrize(
    ("example", "page", "marker"),
    [
        (quickstart, "digits.md", "quickstart"),
        (scaffold_target, "scaffold_target.md", "scaffold"),
        (guide_health, "guide_health.md", "health"),
    ],
)
def test_pages_repeat_the_committed_results(example, page, marker):
    assert shown(page, marker) == example.table(committed(f"{example.__name__}.json"))


def test_the_guide_of_the_committed_health_check_is_alive():
    rows = committed("guide_health.json")
    for row in rows[guide_health.JOINT]:
        assert 0.5 <= row["usage_over_budget"] <= 2
        assert row["guide_std"] > 0.005
        assert not row["warned_dead"]
    for row in rows[guide_health.PLAIN]:
        assert row["warned_dead"]
