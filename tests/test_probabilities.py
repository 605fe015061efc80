"""The measures against others' implementations, the uneven problem, and that the page follows what is committed."""

import json
import statistics
from pathlib import Path

import numpy as np
import probabilities as example
import pytest
import torch
from evidence import PAGES, shown
from sklearn.metrics import balanced_accuracy_score, log_loss
from small_problems import problems, training
from small_problems.candidates import Cell
from small_problems.problems import Problem, Split

ROOT = Path(__file__).parents[1]
DISK, UNIFORM, NORMALIZED = example.DISK, example.UNIFORM, example.NORMALIZED


def committed(name):
    return json.loads((ROOT / "examples" / "results" / name).read_text())


@pytest.fixture
def drawn():
    """Logits, and labels drawn from their own probabilities: they are calibrated."""
    logits = 2 * torch.randn(20_000, 5)
    return logits, torch.multinomial(logits.softmax(1), 1).flatten()


@pytest.fixture
def problem():
    weight = 4 * torch.randn(5, 4)
    inputs = [torch.randn(count, 5) for count in (300, 200, 200)]
    splits = [Split(x, (x @ weight).argmax(1)) for x in inputs]
    return Problem("small", *splits, inputs[0] @ weight, inputs[0][:, :3], 100.0, (5, 2, 4), "gelu", 20)


# ---- the measures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_likelihood_is_that_of_scikit_learn(drawn, temperature):
    logits, y = drawn
    expected = log_loss(y, (logits.double() / temperature).softmax(1))
    assert example.nll(logits, y, temperature) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_is_the_factor_by_which_calibrated_logits_were_multiplied(drawn, factor):
    logits, y = drawn
    found = example.fitted_temperature(factor * logits, y)
    assert found == pytest.approx(factor, rel=0.03)
    assert found == pytest.approx(factor * example.fitted_temperature(logits, y), rel=1e-3)
    best = example.nll(factor * logits, y, found)
    assert all(best < example.nll(factor * logits, y, found * other) for other in (0.98, 1.02))


def test_overconfidence_is_none_for_calibrated_logits_and_appears_when_they_are_multiplied(drawn):
    logits, y = drawn
    calm, loud = (example.measures(factor * logits, y, factor) for factor in (1.0, 3.0))
    assert calm["overconfidence"] == pytest.approx(0, abs=1)
    assert loud["overconfidence"] > 10
    assert loud["accuracy"] == calm["accuracy"]
    assert loud["nll_fitted"] == pytest.approx(calm["nll"])
    assert loud["nll"] > calm["nll"] + 0.1


def test_overconfidence_and_accuracy_by_hand():
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]]).log()
    found = example.measures(logits, torch.tensor([0, 1, 1, 1]), 1.0)
    assert found["accuracy"] == 75
    assert found["overconfidence"] == pytest.approx(75 - 75, abs=1e-5)  # .8, .6, .9, .7
    assert found["balanced"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert found["nll"] == found["nll_fitted"] == pytest.approx(-np.log([0.8, 0.4, 0.9, 0.7]).mean())


def test_recall_is_taken_by_quarters_of_the_classes_most_frequent_first():
    y = torch.arange(8).repeat(2)
    predicted = torch.where((y == 3) | ((y == 6) & (torch.arange(16) < 8)), 0, y)
    counts = torch.tensor([30, 80, 40, 70, 10, 60, 20, 50])  # 1 and 3, 5 and 7, 2 and 0, 6 and 4
    found = example.recall_by_quarters(predicted, y, counts)
    assert [*found] == [*example.QUARTERS]
    assert [*found.values()] == [50, 100, 100, 75]
    assert statistics.fmean(found.values()) == pytest.approx(100 * balanced_accuracy_score(y, predicted))


def test_differences_are_paired_and_to_kd():
    kd = {name: [1.0, 2.0, 4.0] for name in (*example.MEASURES, *example.QUARTERS)}
    found = example.differences({name: [2.0, 4.0, 7.0] for name in kd}, kd)
    assert found.keys() == kd.keys()
    assert all(one["values"] == [1, 2, 3] and one["mean"] == 2 for one in found.values())


# ---- the students ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the guide is dead")  # it is, in so few steps
def test_the_students_are_those_whose_scores_gain_reports(problem):
    kd = {"ce_weight": 0.3, "temperature": 2.0}
    found = example.run_cell("small", Cell(lambda: problem, 1, 3), range(2), kd)
    assert found["kd_settings"] == kd
    for seed in range(2):
        start = training.warm_student(problem, seed, 1)
        expected = {"KD": training.train_kd(problem, start, [kd], seed, 3)[0]}
        for name, settings in example.METHODS.items():
            expected[name] = training.train_disk(problem, start, {"temperature": 2.0, **settings}, seed, 3)
        for name, scores in expected.items():
            assert found["methods"][name]["accuracy"][seed] == pytest.approx(scores.test, abs=1e-4)


def test_what_is_kept_is_not_trained_again(problem, monkeypatch):
    kd = {"ce_weight": 0.3, "temperature": 2.0}
    cell = Cell(lambda: problem, 1, 3)
    whole = example.run_cell("small", cell, range(2), kd)
    part = {**whole, "methods": {name: row for name, row in whole["methods"].items() if name != NORMALIZED}}
    assert example.run_cell("small", cell, range(2), None, part)["methods"] == whole["methods"]
    monkeypatch.setattr(example, "warm_student", None)
    assert example.run_cell("small", cell, range(2), None, whole) == whole


def test_the_normalizers_gradient_is_that_of_autograd_about_its_mean(problem):
    disks = [training.make_disk(problem, {"normalized": normalized}) for normalized in (True, False)]
    disks[0].load_state_dict(disks[1].state_dict())
    for disk in disks:
        torch.nn.init.normal_(disk.guide.mlp[-1].weight)
        disk.level.log_guide.fill_(-2.0)
    disks[0].load_state_dict(disks[1].state_dict())
    inputs = torch.randn(20, 4, requires_grad=True), problem.teacher_logits[:20], problem.train.y[:20]
    features = problem.teacher_features[:20]
    placed = disks[1].level.place(disks[1].guide_logits(inputs[1], features))
    losses = [disk(*inputs, features) for disk in disks]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, [*disk.guide.parameters()]) for loss, disk in zip(losses, disks, strict=True)]
    slopes = torch.autograd.grad(torch.log1p(4 * placed.sigmoid()).sum(), placed, retain_graph=True)[0]
    expected = torch.autograd.grad(((slopes - slopes.mean()) * placed).mean(), [*disks[1].guide.parameters()])
    for ours, plain, more in zip(*grads, expected, strict=True):
        torch.testing.assert_close(ours - plain, more, rtol=1e-3, atol=1e-7)
    assert any(more.abs().max() > 1e-4 for more in expected)


def test_the_temperature_is_fitted_on_validation_data_alone(problem):
    student = training.warm_student(problem, 0, 2)
    found = example.look(student, problem)
    turned = problem._replace(test=Split(problem.test.x, problem.test.y.roll(1)))
    assert example.look(student, turned)["temperature"] == found["temperature"]
    turned = problem._replace(validation=Split(problem.validation.x, problem.validation.y.roll(1)))
    other = example.look(student, turned)
    assert other["temperature"] != found["temperature"]
    assert other["nll"] == found["nll"]


def test_uneven_clusters_has_classes_of_the_frequencies_that_it_claims(monkeypatch):
    monkeypatch.setattr(problems, "_with_teacher", lambda name, splits, *_, **__: splits)  # which takes seconds
    train, validation, test = problems.uneven_clusters()
    assert [len(split.y) for split in (train, validation, test)] == [20_000, 8_000, 12_000]
    shares = np.geomspace(1, 1 / 20, 20)
    every = torch.bincount(torch.cat([train.y, validation.y, test.y]))
    np.testing.assert_allclose(every / every.sum(), shares / shares.sum(), rtol=0.01)
    assert [*every] == sorted(every, reverse=True)
    for name in example.UNEVEN:
        counts = committed("probabilities.json")["rows"][name]["class_counts"]
        assert torch.bincount(train.y).tolist() == counts


# ---- what is committed ----------------------------------------------------------------------------------------------


@pytest.fixture
def found():
    return committed("probabilities.json")


def test_the_page_repeats_the_committed_results(found):
    assert [*found["rows"]] == [*example.CELLS]
    assert len(found["seeds"]) >= 5
    assert shown("probabilities.md", "probabilities-kd") == example.kd_table(found)
    assert shown("probabilities.md", "probabilities-disk") == example.table(found, DISK)
    assert shown("probabilities.md", "probabilities-uniform") == example.table(found, UNIFORM)
    assert shown("probabilities.md", "probabilities-normalized") == example.table(found, NORMALIZED)
    assert shown("probabilities.md", "probabilities-quarters") == example.quarter_table(found)


def test_committed_differences_are_those_of_the_committed_values(found):
    for row in found["rows"].values():
        for method in example.METHODS:
            expected = example.differences(row["methods"][method], row["methods"]["KD"])
            for measure, one in row["differences"][method].items():
                assert one["mean"] == pytest.approx(expected[measure]["mean"], abs=2e-5)
                assert one["interval_95"] == pytest.approx(expected[measure]["interval_95"], abs=5e-5)
        normalized = example.differences(row["methods"][NORMALIZED], row["methods"][DISK])
        for measure, one in row["normalized"].items():
            assert one["mean"] == pytest.approx(normalized[measure]["mean"], abs=2e-5)


def test_the_committed_students_are_those_of_gain(found):
    gain, furthest = committed("gain.json"), 0.0
    assert found["seeds"] == gain["seeds"]
    for name in found["rows"].keys() - example.UNEVEN.keys():
        row, theirs = found["rows"][name], gain["rows"][name]
        assert row["kd_settings"] == theirs["kd_settings"]
        for method, scores in {"KD": theirs["kd"], **theirs["rows"]}.items():
            if method in row["methods"]:
                pairs = zip(row["methods"][method]["accuracy"], scores["test"], strict=True)
                furthest = max(furthest, *(abs(mine - other) for mine, other in pairs))
    assert f"differ by up to {furthest:.2f} points" in (PAGES / "probabilities.md").read_text()
    assert furthest < 0.5


def ends(values, form):
    """Return "smallest to largest" as the page writes it."""
    return f"{min(values):{form}} to {max(values):{form}}"


def test_sentences_have_the_committed_numbers(found):
    rows = found["rows"]
    limited = [rows[name] for name in (*example.LIMITED, *example.UNEVEN)]
    digits = rows["digits, warm, 30 passes"]["differences"][DISK]

    def means(measure, method=DISK, of=limited):
        return [row["differences"][method][measure]["mean"] for row in of]

    page = (PAGES / "probabilities.md").read_text()
    likelihood, confidence = ends(means("nll"), ".3f"), ends(means("overconfidence"), ".2f")
    left = ends(means("nll_fitted"), ".3f")
    temperatures = {
        method: ends([statistics.fmean(row["methods"][method]["temperature"]) for row in limited], ".2f")
        for method in ("KD", DISK)
    }
    few, more = (rows[name] for name in example.UNEVEN)
    frequent, rarer = example.QUARTERS[:2], example.QUARTERS[2:]
    by_half = [[mean for name in names for mean in means(name, of=(few, more))] for names in (frequent, rarer)]
    lowest = more["differences"][DISK][rarer[0]]
    rarest = [statistics.fmean(row["methods"]["KD"][rarer[1]]) for row in (few, more)]
    counts = few["class_counts"]
    changes = [row["normalized"] for row in rows.values()]
    places = {"accuracy": "+.2f", "nll": "+.3f"}
    normalized = {name: ends([each[name]["mean"] for each in changes], form) for name, form in places.items()}
    for sentence in (
        f"(NLL) is {likelihood} nats higher, and they are overconfident by {confidence} points more.",
        f"leaves {left} nats of the difference.",
        f"it is {digits['nll']['mean']:.3f} nats, and {digits['nll_fitted']['mean']:.3f} with the temperatures.",
        "balanced accuracy is {:.2f} and {:.2f} points above KD's".format(*means("balanced", of=(few, more))),
        f"temperatures are {temperatures[DISK]} for DiSK where capacity limits, and {temperatures['KD']} for KD.",
        f"its NLL is {ends(means('nll', UNIFORM), '.3f')} nats above KD's where capacity limits.",
        f"is {lowest['mean']:.2f} points ({lowest['interval_95'][0]:+.2f} to {lowest['interval_95'][1]:+.2f}), in the",
        "rarest quarter is {:.2f} % with 5 units and {:.2f} % with 16.".format(*rarest),
        f"half**: {ends(by_half[0], '.2f')} points in its four quarters, {ends(by_half[1], '+.2f')} in the rarer ones.",
        f"the most frequent class has {counts[0]:,} and the rarest {counts[-1]}.",
        f"accuracy are {normalized['accuracy']} points, in NLL {normalized['nll']} nats.",
    ):
        assert sentence in page
    assert lowest["mean"] == min(by_half[1])
    assert f"the NLL is {likelihood} nats above KD's; {left} with fitted" in (PAGES / "index.md").read_text()
    faq, settings = ((PAGES.parent / name).read_text() for name in ("faq.md", "settings.md"))
    assert f"by {confidence} points more than KD's" in faq
    assert f"is {likelihood} nats higher" in faq
    assert f"is {likelihood} nats above KD's" in settings


def test_what_the_page_says_without_a_number_holds(found):
    rows = found["rows"]
    for name in (*example.LIMITED, *example.UNEVEN):
        paired = rows[name]["differences"]
        for method in (DISK, UNIFORM):
            for measure in ("accuracy", "balanced", "nll", "overconfidence", "nll_fitted"):
                assert paired[method][measure]["interval_95"][0] > 0
    for name in example.UNEVEN:
        for method in (DISK, UNIFORM):
            assert all(rows[name]["differences"][method][one]["interval_95"][1] >= 0 for one in example.QUARTERS)
    assert all(rows[name]["kd_settings"]["ce_weight"] == 0 for name in example.LIMITED[:2])
    low, high = rows["digits, warm, 30 passes"]["differences"][DISK]["accuracy"]["interval_95"]
    assert low < 0 < high


def test_one_seed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["probabilities.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--seeds must be at least 2 for an interval, got 1" in capsys.readouterr().err
