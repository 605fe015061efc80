"""The comparison of forms: its arithmetic, its rule, and that package and documents follow what is committed."""

import json
import math
import re
from pathlib import Path

import gain as example
import gaps
import pytest
import torch
from evidence import shown
from small_problems import candidates, report, training
from small_problems.problems import Problem, Split

from disk_plugin import functional
from disk_plugin.level import OVER, PATIENCE, SHARE

ROOT = Path(__file__).parents[1]


def committed(name):
    return json.loads((ROOT / "examples" / "results" / name).read_text())


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    weight = 4 * torch.randn(5, 4, generator=generator)
    inputs = [torch.randn(count, 5, generator=generator) for count in (300, 200, 200)]
    splits = [Split(x, (x @ weight).argmax(1)) for x in inputs]
    return Problem("small", *splits, inputs[0] @ weight, inputs[0][:, :3], 100.0, (5, 2, 4), "gelu", 20)


def cell(name, **forms):
    """Accuracies of KD (50 on three seeds) and of forms that are ahead by so much."""
    rows = {"KD": [50.0] * 3, **{form: [50.0 + lead for lead in leads] for form, leads in forms.items()}}
    return {
        "cell": name,
        "seeds": [0, 1, 2],
        "kd_settings": {"temperature": 2.0, "ce_weight": 0.1},
        "teacher_test": 90.0,
        "rows": {form: dict.fromkeys(("train", "validation", "test"), values) for form, values in rows.items()},
    }


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_stack_of_kd_students_is_each_of_them_alone(problem):
    start = training.new_student(problem, 1)
    trials = [{"ce_weight": 0.0, "temperature": 1.0}, {"ce_weight": 0.3, "temperature": 4.0}]
    stacked = training.train_kd(problem, start, trials, 1, 3)
    x, y = problem.train
    for trial, scores in zip(trials, stacked, strict=True):
        student = training.copy.deepcopy(start)
        settings = {**trial, "distill_weight": 1 - trial["ce_weight"]}
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        for epoch in range(3):
            for index in training.batches(problem, 1, epoch):
                loss = functional.kd_loss(student(x[index]), problem.teacher_logits[index], y[index], **settings)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        assert scores == training._scores(problem, student)


@pytest.mark.filterwarnings("ignore:g is 1, its largest")
def test_disk_without_a_discount_is_kd(problem):
    start = training.new_student(problem, 1)
    kd = training.train_kd(problem, start, [{"ce_weight": 0.1, "temperature": 2.0}], 1, 4)[0]
    assert kd.train > 40
    settings = {"ce_weight": 0.1, "temperature": 2.0}
    assert training.train_disk(problem, start, {**settings, "uniform": {"value": 0.0}}, 1, 4) == kd
    assert training.train_disk(problem, start, {**settings, "discount": 0.9}, 1, 4) != kd


@pytest.mark.filterwarnings("ignore:the guide is dead")  # some are, in so few steps
@pytest.mark.parametrize("form", candidates.FORMS)
def test_every_form_is_one_that_trains(problem, form):
    start = training.new_student(problem, 0)
    scores = training.train_disk(problem, start, {"temperature": 2.0, **candidates.FORMS[form]}, 0, 4)
    assert all(0 <= score <= 100 for score in scores)


# ---- the rule -------------------------------------------------------------------------------------------------------


def test_the_rule_takes_the_largest_mean_gain_of_those_that_are_behind_nowhere():
    found = report.choice(
        [
            cell("wide, warm", bold=[6.0, 6.0, 6.0], safe=[3.0, 3.1, 2.9], shy=[1.0, 1.0, 1.0]),
            cell("digits, warm", bold=[-2.0, -2.1, -1.9], safe=[-0.4, -0.4, -0.4], shy=[0.0, 0.0, 0.0]),
        ]
    )
    assert found["rows"]["bold"]["behind"] == ["digits, warm"]
    assert found["rows"]["safe"]["mean_gain"] == pytest.approx((3.0 - 0.4) / 2)
    assert found["picked"] == "safe"
    assert report.choice_table(found).splitlines()[2].startswith("| bold | +2.00 | 1 of 2 | -2.00 (digits, warm) |")


def test_without_a_safe_form_the_gain_on_the_problems_that_capacity_limits_decides():
    found = report.choice(
        [
            cell("wide, warm", bold=[6.0, 6.0, 6.0], other=[5.0, 5.0, 5.0]),
            cell("digits, warm", bold=[-9.0, -9.0, -9.0], other=[-2.0, -2.0, -2.0]),
        ]
    )
    assert found["picked"] == "bold"
    assert report.choice_table(found).endswith("By the rule: bold (no form is behind KD nowhere).")


def test_what_is_within_the_noise_is_not_behind():
    noisy = cell("wide, warm", form=[-4.0, 0.0, 1.0])  # mean -1, two standard errors 3.06
    assert report.choice([noisy])["rows"]["form"]["behind"] == []


def test_every_problem_weighs_the_same():
    cells = [cell(f"a, {i}", form=[3.0] * 3) for i in range(3)] + [cell("b, warm", form=[0.0] * 3)]
    assert report.choice(cells)["rows"]["form"]["mean_gain"] == pytest.approx(1.5)


def test_intervals_are_paired_t_intervals():
    row, kd = {"test": [3.0, 5.0, 4.0]}, {"test": [1.0, 1.0, 3.0]}
    found = report.difference(row, kd, "test")
    assert found["mean"] == pytest.approx(7 / 3)
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)  # t quantile .975 with 2 degrees of freedom, variance of 2, 4, 1
    assert found["interval_95"] == pytest.approx([7 / 3 - half, 7 / 3 + half], rel=1e-5)


def test_the_table_names_each_column_rightly_in_whatever_order_the_cells_were_trained():
    first, second = cell("a, warm", one=[1.0] * 3, two=[2.0] * 3), cell("b, warm", two=[4.0] * 3, one=[3.0] * 3)
    lines = report.gain_table(report.gain([first, second])).splitlines()
    assert lines[0].endswith("| one | two |")
    assert [re.findall(r"([+-]\d\.\d\d) \(", line) for line in lines[2:]] == [["+1.00", "+2.00"], ["+3.00", "+4.00"]]


# ---- what is committed ----------------------------------------------------------------------------------------------


def test_the_packages_default_is_what_the_rule_picked():
    found = committed("gain_choice.json")
    assert found["picked"] == report.picked(found["rows"])
    numbers = re.fullmatch(r"guide, discount auto, share (\S+) over (\S+), patience (\S+)", found["picked"]).groups()
    assert tuple(map(float, numbers)) == (SHARE, OVER, PATIENCE)
    assert candidates.FORMS[found["picked"]].get("ce_weight", 0.0) == 0.0
    assert set(found["rows"]) == set(candidates.FORMS)


def test_what_was_chosen_from_was_not_reported():
    choice, reported = committed("gain_choice.json"), committed("gain.json")
    assert not set(choice["seeds"]) & set(reported["seeds"])
    assert len(reported["seeds"]) >= 5
    cells = next(iter(choice["rows"].values()))["cells"]
    assert len({candidates.problem_of(name) for name in cells}) >= 6
    new = [name for name in reported["rows"] if "(new)" in name]
    assert len(new) >= 4
    assert not set(new) & set(cells)


def test_the_page_repeats_the_committed_results():
    assert shown("default.md", "choice") == report.choice_table(committed("gain_choice.json"))
    found, forms = committed("gain.json"), [*candidates.REPORTED]
    assert [*next(iter(found["rows"].values()))["differences"]] == forms
    assert shown("default.md", "gain") == report.gain_table(found, forms[:2])
    assert shown("default.md", "gain-controls") == report.gain_table(found, forms[2:])


def test_what_capacity_gap_says_of_problems_outside_its_rule_is_committed_beside_what_was_measured():
    found, measured = committed("gaps.json"), committed("gain.json")["rows"]
    assert shown("regime_map.md", "gaps") == gaps.table(found)
    assert [*found] == [*gaps.warm_cells()]
    assert len(found) >= 3
    for name, row in found.items():
        assert row["measured"] == measured[name]["differences"][gaps.FORM]


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x.npz"], "--data and --teacher belong together"),
        (["--seeds", "1"], "--seeds must be at least 2 for an interval, got 1"),
    ],
)
def test_bad_flags_are_refused(monkeypatch, capsys, words, message):
    monkeypatch.setattr("sys.argv", ["gain.py", *words])
    with pytest.raises(SystemExit):
        example.arguments()
    assert message in capsys.readouterr().err


def test_a_cell_that_is_there_is_not_trained_again_and_a_new_form_is_added(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "KD_TRIALS", candidates.KD_TRIALS[:2])
    small, calls = candidates.Cell(lambda: problem, 1, 2), []
    real = example.train_disk
    monkeypatch.setattr(example, "train_disk", lambda *inputs: calls.append(inputs) or real(*inputs))
    forms = {"one": {"discount": 0.2}}
    job = ("small, warm", small, forms, range(2), tmp_path)
    example.run_cell(job)
    assert len(calls) == 2
    example.run_cell(job)
    assert len(calls) == 2
    before = json.loads((tmp_path / "small-warm.json").read_text())
    forms["two"] = {"uniform": {"value": 0.1}}
    example.run_cell(job)
    assert len(calls) == 4
    after = json.loads((tmp_path / "small-warm.json").read_text())
    assert {**after["rows"], "two": None} == {**before["rows"], "two": None}
