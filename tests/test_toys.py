"""The toy problems of Table 1: a batch of starts equals starts one by one, minima, counts, and what is committed."""

import copy
import json
import math
from pathlib import Path

import gaussians
import intervals
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from toys import table1
from toys.starts import LEARNING_RATE, MOMENTUM, PASSES, WEIGHT_DECAY, Problem, Starts, student_loss, train

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional

TOYS = (intervals.TOY, gaussians.TOY)
SETTINGS = {
    "ce_weight": 0.1,
    "temperature": 2.0,
    "student_temperature": 4.0,
    "top_k": 2,
    "multiplier": (1.0, 20.0),
    "budget": 0.05,
    "period": 2,
}


@pytest.fixture
def problem():
    torch.manual_seed(5)
    x = torch.randn(24, 2)
    return Problem(x, torch.randint(3, (24,)), 3 * torch.randn(24, 3), torch.randn(24, 4))


def make_student():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))


def sgd(module, lr=LEARNING_RATE):
    return torch.optim.SGD(module.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY)


def one_by_one(problem, starts, iterations, method, norm="layer", scale=None, inputs="both"):
    """Algorithm 1, or KD, as plain loops over single modules."""
    torch.manual_seed(7)
    students = [make_student() for _ in range(starts)]
    losses = [
        DiSKLoss(
            GuideHead(3, 4, hidden_dims=(5,), norm=norm, use_logits=inputs == "both"),
            ce_weight=0.1,
            distill_weight=0.9,
            guide_gradient_scale=scale,
            **{key: SETTINGS[key] for key in ("temperature", "student_temperature", "top_k", "budget")},
        )
        for _ in range(starts)
    ]
    for student, disk in zip(students, losses, strict=True):
        optimizer, guide_optimizer = sgd(student), sgd(disk, 0.03)
        if method == "DiSK":
            dual = DualScheduler(disk, epochs=iterations, multiplier=SETTINGS["multiplier"], period=2)
        for _ in range(iterations):
            for step in range(2 * PASSES if method == "DiSK" else PASSES):
                logits = student(problem.x)
                if method == "KD":
                    keys = ("ce_weight", "temperature", "student_temperature")
                    kd = {key: SETTINGS[key] for key in keys}
                    loss = functional.kd_loss(logits, problem.teacher_logits, problem.y, distill_weight=0.9, **kd)
                else:
                    terms = disk.terms(logits, problem.teacher_logits, problem.y, problem.teacher_features)
                    loss = terms.guide_loss if step < PASSES else terms.student_loss
                own = guide_optimizer if method == "DiSK" and step < PASSES else optimizer
                student.zero_grad()
                disk.zero_grad()
                loss.backward()
                own.step()
            if method == "DiSK":
                dual.step()
    return students


@pytest.mark.parametrize(
    ("method", "norm", "scale", "inputs"),
    [
        ("KD", "layer", None, "both"),
        ("DiSK", "layer", None, "both"),
        ("DiSK", "batch", 0.3, "both"),
        ("DiSK", "batch", 0.3, "features"),
    ],
)
def test_a_batch_of_starts_equals_starts_one_by_one(problem, method, norm, scale, inputs):
    expected = one_by_one(problem, 3, 3, method, norm, scale, inputs)
    disk = {"guide_lr": 0.03, "hidden_dims": (5,), "norm": norm, "guide_gradient_scale": scale, "inputs": inputs}
    trained = train(make_student, problem, method, SETTINGS, starts=3, iterations=3, seed=7, disk=disk)
    for index, student in enumerate(expected):
        for name, value in student.named_parameters():
            torch.testing.assert_close(trained.students.parameters[name][index], value, rtol=1e-3, atol=1e-5)


def test_cross_entropy_ignores_the_teacher(problem):
    other = problem._replace(teacher_logits=-problem.teacher_logits)
    ends = [train(make_student, each, "CE", {}, starts=2, iterations=2, seed=0) for each in (problem, other)]
    for name, value in ends[0].students.parameters.items():
        assert torch.equal(value, ends[1].students.parameters[name])


def test_all_methods_begin_with_the_same_starts(problem):
    begun = {}
    for method in table1.METHODS:
        made = begun[method] = []

        def remembered(made=made):
            student = make_student()
            made.append(student[0].weight.detach().clone())
            return student

        train(remembered, problem, method, SETTINGS, starts=2, iterations=1, seed=3)
    for method in ("KD", "DiSK"):
        assert all(torch.equal(a, b) for a, b in zip(begun["CE"], begun[method], strict=True))
    assert not torch.equal(*begun["CE"])


def test_minibatches_give_every_method_the_same_student_steps(problem):
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append((torch.is_grad_enabled(), len(x)))
            return super().forward(x)

    def steps(method):
        calls.clear()
        train(lambda: Counted(2, 3), problem, method, SETTINGS, starts=2, iterations=2, seed=0, batch_size=10)
        return [size for grad, size in calls if grad]

    assert steps("KD") == steps("DiSK") == [10, 10, 4] * PASSES * 2


def test_the_drawn_loss_is_the_trained_one(problem):
    torch.manual_seed(0)
    logits, guide = torch.randn(24, 3), torch.rand(24)
    terms = functional.disk_terms(
        logits,
        problem.teacher_logits,
        problem.y,
        guide.logit(),
        distill_weight=0.9,
        **{key: SETTINGS[key] for key in ("ce_weight", "temperature", "student_temperature", "top_k", "budget")},
    )
    torch.testing.assert_close(student_loss(logits, problem, SETTINGS, guide), terms.student_loss)
    at_zero = student_loss(logits, problem, SETTINGS, torch.full((24,), 1e-30))
    torch.testing.assert_close(at_zero, student_loss(logits, problem, SETTINGS, None))


def test_an_interval_by_hand():
    module = intervals.Intervals(1)
    module.ends.data = torch.tensor([[2.0, 3.0]])
    x = torch.tensor([2.5, 2.0, 8.0])
    inside = 1 / (1 + math.exp(-5)) - 1 / (1 + math.exp(5))
    edge = 0.5 - 1 / (1 + math.exp(10))
    expected = torch.tensor([inside, edge, intervals.CLAMP])  # far outside the clamp holds
    torch.testing.assert_close(module(x)[:, 1].exp(), expected)
    torch.testing.assert_close(module(x).exp().sum(1), torch.ones(3))


def test_interval_data_are_balanced_and_labelled_by_the_two_intervals():
    x, y = intervals.sample(1000, 0)
    assert y.sum() == 500
    inside = ((x > 2) & (x < 3)) | ((x > 5) & (x < 7))
    assert torch.equal(inside.long(), y)
    assert not torch.equal(x, intervals.sample(1000, 1)[0])


@pytest.mark.parametrize("seed", [table1.REPORT_SEED, *table1.SEARCH_SEEDS])
def test_the_teacher_is_two_intervals(seed):
    data = intervals.problem(seed)
    order = data.teacher_features[data.x < 4].mean(0).argsort(descending=True)
    values = data.teacher_features[:, order]
    assert values[(data.x > 2.2) & (data.x < 2.8), 0].min() > 0.8
    assert values[(data.x > 5.2) & (data.x < 6.8), 1].min() > 0.8
    assert values.min() >= 0
    assert (data.teacher_logits.argmax(1) == data.y).float().mean() > 0.96


def test_interval_minima_are_told_apart_by_their_ends():
    modules = [intervals.Intervals(1) for _ in range(4)]
    for module, ends in zip(modules, ([2.1, 3.2], [1.8, 7.3], [5.3, 6.8], [3.5, 6.9]), strict=True):
        module.ends.data = torch.tensor([ends])
    assert intervals.classify(Starts(modules), None, 0).tolist() == [1, 2, 3, 0]


def test_gaussian_clusters_follow_the_papers_grid():
    x, y = gaussians.sample(6000, 0)
    centres = {(0, 0): 0, (1.5, 0): 1, (3, 0): 2, (0, 1.5): 1, (1.5, 1.5): 2, (3, 1.5): 0}
    nearest = torch.cdist(x, torch.tensor(list(centres), dtype=torch.float32)).argmin(1)
    agree = torch.tensor(list(centres.values()))[nearest] == y
    assert agree.all()
    assert x[:, 0][nearest == 0].std().item() == pytest.approx(0.05, rel=0.1)


def test_gaussian_minima_are_told_apart_by_accuracy(monkeypatch):
    accuracy = torch.tensor([0.3, 0.67, 0.75, 0.83, 0.86, 0.94, 0.95, 1.0])
    monkeypatch.setattr(gaussians, "accuracies", lambda *_: accuracy)
    assert gaussians.classify(None, None, 0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_accuracy_uses_the_training_datas_batch_statistics(problem):
    torch.manual_seed(0)
    modules = [make_student() for _ in range(2)]
    x, y = torch.randn(30, 2), torch.randint(3, (30,))
    expected = []
    for module in copy.deepcopy(modules):
        norm = module[1]
        hidden = module[0](problem.x)
        norm.running_mean, norm.running_var = hidden.mean(0).detach(), hidden.var(0).detach()
        expected.append((module.eval()(x).argmax(1) == y).float().mean())
    torch.testing.assert_close(gaussians.accuracies(Starts(modules), problem, x, y), torch.stack(expected))


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_a_run_repeats_itself_and_counts_every_start(toy):
    settings = {**SETTINGS, "disk": {"hidden_dims": (4,)}}
    seen = [table1.run(toy, "DiSK", settings, starts=3, seed=1, iterations=2) for _ in range(2)]
    assert torch.equal(seen[0].guide, seen[1].guide)
    assert sum(table1.counts(toy, seen[0], 1).values()) == 3
    assert seen[0].discount.shape == seen[0].guide.shape == (3, toy.make_problem(1).x.shape[0])


def test_wilsons_interval():
    # 90 of 100: centre (p + z^2/2n) / (1 + z^2/n), from the formula with z = 1.959964
    z, n, p = 1.959964, 100, 0.9
    centre, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    expected = [100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)]
    assert list(table1.interval(90, 100)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
class TestCommitted:
    def test_counts_are_of_all_starts_worst_minimum_first(self, toy):
        results = json.loads((table1.RESULTS / f"{toy.name}.json").read_text())
        assert list(results["counts"]) == list(table1.METHODS)
        for row in results["counts"].values():
            assert list(row) == list(toy.minima)
            assert sum(row.values()) == results["starts"] == 100

    def test_settings_are_those_of_the_search_with_as_many_trials(self, toy):
        results = json.loads((table1.RESULTS / f"{toy.name}.json").read_text())
        found = json.loads((table1.RESULTS / f"{toy.name}_search.json").read_text())
        assert found["KD"]["trials"] == found["DiSK"]["trials"] == len(found["DiSK"]["rows"])
        for method in ("KD", "DiSK"):
            assert results["settings"][method] == found[method]["settings"]
            best = max(row["counts"][toy.minima[-1]] for row in found[method]["rows"])
            assert found[method]["counts"][toy.minima[-1]] == best
            drawn = json.loads(json.dumps(table1.draw(toy, method, found[method]["trials"])))
            assert [row["settings"] for row in found[method]["rows"]] == drawn

    def test_no_trial_was_drawn_twice(self, toy):
        for method in ("KD", "DiSK"):
            drawn = [json.dumps(settings, sort_keys=True) for settings in table1.draw(toy, method, 30)]
            assert len(set(drawn)) == 30

    def test_the_report_uses_other_data_and_starts_than_the_search(self, toy):
        assert table1.REPORT_SEED not in table1.SEARCH_SEEDS
        assert not torch.equal(toy.make_problem(0).x, toy.make_problem(table1.SEARCH_SEEDS[0]).x)

    def test_the_readme_repeats_the_table(self, toy):
        results = json.loads((table1.RESULTS / f"{toy.name}.json").read_text())
        readme = Path(table1.RESULTS.parent / "README.md").read_text()
        assert table1.table(toy, results) in readme
        ablation = json.loads((table1.RESULTS / f"{toy.name}_ablation.json").read_text())
        assert table1.ablation_table(toy, ablation) in readme
        module = {"intervals": intervals, "gaussians": gaussians}[toy.name]
        assert list(ablation["rows"]) == list(module.ABLATIONS)


def test_intervals_are_searched_over_the_papers_ranges():
    ranges = intervals.TOY.trials["DiSK"]
    assert set(ranges["temperature"]) <= {1, 2, 4}
    assert set(ranges["student_temperature"]) <= {1, 2, 4}
    assert set(ranges["ce_weight"]) <= {0.0, 0.1, 0.5, 0.9, 1.0}
    assert set(ranges["top_k"]) <= {1, 2, 3}
    assert set(ranges["multiplier_min"]) <= {0.01, 0.1, 1, 5, 10}
    assert set(ranges["multiplier_max"]) <= {1, 5, 10, 20, 50, 100, 1000}
    assert set(ranges["budget"]) <= {0.1, 0.05, 0.0}
    assert set(ranges["period"]) <= {20, 50}


def test_hard_labels_decide_where_the_teacher_is_silent(problem):
    """At ce_weight 1 the student's loss is cross-entropy, whatever the guide."""
    logits = torch.randn(24, 3)
    value = student_loss(logits, problem, {**SETTINGS, "ce_weight": 1.0}, torch.rand(24))
    torch.testing.assert_close(value, F.cross_entropy(logits, problem.y))
