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
from torch import nn

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"


def committed(name):
    return json.loads((RESULTS / name).read_text())


def test_every_method_had_at_most_as_many_trials_as_kd_and_disk_as_many():
    chosen = committed("quickstart_search.json")
    assert chosen["KD"]["trials"] == chosen["DiSK"]["trials"] == quickstart.TRIALS
    for method in quickstart.METHODS:
        assert chosen[method]["settings"] in quickstart.trials(method)


def test_the_committed_results_used_the_committed_settings():
    assert committed("quickstart.json")["protocol"]["search"] == committed("quickstart_search.json")


@pytest.mark.parametrize("example", [quickstart, scaffold_target, guide_health])
def test_readme_repeats_the_committed_results(example):
    assert example.table(committed(f"{example.__name__}.json")) in (ROOT / "README.md").read_text()


def test_search_and_report_use_different_seeds():
    assert not set(quickstart.SEARCH_SEEDS) & set(range(committed("quickstart.json")["protocol"]["seeds"]))


@pytest.mark.parametrize(
    ("disk", "verdict"),
    [
        ([3.0, 4.0, 3.5], "DiSK is better than KD"),
        ([-3.0, -4.0, -3.5], "DiSK is worse than KD"),
        ([1.0, -1.0, 0.5], "no"),
    ],
)
def test_the_verdict_follows_the_interval(disk, verdict):
    methods = {"DiSK": {"test_last_epoch": {"values": disk}}, "KD": {"test_last_epoch": {"values": [0.0] * 3}}}
    result = quickstart.paired_difference(methods)
    assert result["verdict"].startswith(verdict)
    low, high = result["interval_95"]
    half = 4.302653 * torch.tensor(disk).std().item() / 3**0.5  # t quantile .975 with 2 degrees of freedom
    assert high - low == pytest.approx(2 * half, rel=1e-4)


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
