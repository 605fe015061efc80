"""The examples' own figures: what their arithmetic gives, and that documents repeat the committed results."""

import json
import re
import types
from pathlib import Path

import guide_health
import pytest
import quickstart
import scaffold_target
import torch
from evidence import shown
from torch import nn

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


def test_the_loop_in_the_readme_runs_as_it_stands():
    (loop,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    student = nn.Linear(8, 5)
    before = [parameter.clone() for parameter in student.parameters()]
    names = {
        "torch": torch,
        "SGD": torch.optim.SGD,
        "student": student,
        "teacher": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)),
        "loader": [(torch.randn(4, 8), torch.randint(5, (4,))) for _ in range(3)],
        "scheduler": types.SimpleNamespace(step=lambda: None),
        "num_classes": 5,
        "device": "cpu",
        "epochs": 4,
    }
    exec(loop, names)
    assert names["dual"].epoch == 4
    assert all(not torch.equal(now, old) for now, old in zip(student.parameters(), before, strict=True))
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["disk"].parameters())
