"""The toy problems of Table 1: a batch of starts equals starts one by one, minima, counts, and what is committed."""

import copy
import json
import math
import types

import gaussians
import intervals
import pytest
import torch
from evidence import shown
from torch import nn
from torch.nn import functional as F  # noqa: N812
from toys import best_of, rows, table1, tables
from toys.starts import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Problem, Starts
from toys.training import PASSES, ramped, student_loss, train

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional

TOYS = (intervals.TOY, gaussians.TOY)
KD = {"ce_weight": 0.1, "temperature": 2.0, "student_temperature": 4.0}
RAMP = {**KD, "top_k": 2, "ramp": [2, 1.0]}
DISK = {**KD, "top_k": 2, "multiplier": [1.0, 20.0], "budget": 0.05, "period": 2, "guide": {"hidden_dims": [5]}}
EACH = {"CE": {"ce_weight": 1.0}, "KD": KD, "ramp": RAMP, "DiSK": DISK}


def committed(name):
    return json.loads((table1.RESULTS / name).read_text())


@pytest.fixture
def problem():
    torch.manual_seed(5)
    x = torch.randn(24, 2)
    return Problem(x, torch.randint(3, (24,)), 3 * torch.randn(24, 3), torch.randn(24, 4))


def make_student():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))


def sgd(module, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY):
    return torch.optim.SGD(module.parameters(), lr, MOMENTUM, weight_decay=weight_decay)


def one_by_one(problem, starts, iterations, settings):
    """Algorithm 1, KD, or one g for all, as plain loops over single modules."""
    torch.manual_seed(7)
    students = [make_student() for _ in range(starts)]
    guide = dict(settings.get("guide", {"hidden_dims": [5]}))
    optimizing = guide.pop("lr", LEARNING_RATE), guide.pop("weight_decay", WEIGHT_DECAY)
    scale, inputs = guide.pop("gradient_scale", None), guide.pop("inputs", "both")
    losses = [
        DiSKLoss(
            GuideHead(3, 4, use_logits=inputs == "both", **guide),
            distill_weight=0.9,
            budget=0.05,
            top_k=2,
            guide_gradient_scale=scale,
            **KD,
        )
        for _ in range(starts)
    ]
    for student, disk in zip(students, losses, strict=True):
        optimizer, guide_optimizer = sgd(student), sgd(disk, *optimizing)
        alternates = "guide" in settings
        if alternates:
            dual = DualScheduler(disk, epochs=iterations, multiplier=(1.0, 20.0), period=2)
        for iteration in range(iterations):
            for step in range(2 * PASSES if alternates else PASSES):
                logits = student(problem.x)
                if alternates:
                    terms = disk.terms(logits, problem.teacher_logits, problem.y, problem.teacher_features)
                    loss = terms.guide_loss if step < PASSES else terms.student_loss
                else:
                    loss = by_hand(logits, problem, 1 - (iteration % 2) / 2 if "ramp" in settings else 0.0)
                student.zero_grad()
                disk.zero_grad()
                loss.backward()
                (guide_optimizer if alternates and step < PASSES else optimizer).step()
            if alternates:
                dual.step()
    return students


def by_hand(logits, problem, g):
    """ce_weight .1; (4) at temperatures 2 and 4 under one g on the teacher's two largest classes."""
    t, s = (problem.teacher_logits / 2).softmax(1), (logits / 4).softmax(1)
    scaffolded = s + g * (problem.teacher_logits > problem.teacher_logits.amin(1, keepdim=True))
    return 0.1 * F.cross_entropy(logits, problem.y) + 0.9 * 8 * (t * (t / scaffolded).log()).sum(1).mean()


OPTIMIZED = {"hidden_dims": [5], "norm": "batch", "gradient_scale": 0.3, "lr": 0.03, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "settings",
    [
        KD,
        RAMP,
        DISK,
        {**DISK, "guide": {**OPTIMIZED, "initial": 0.9}},
        {**DISK, "guide": {**OPTIMIZED, "inputs": "features"}},
    ],
    ids=["KD", "ramp", "DiSK", "batch norm, open start", "features alone"],
)
def test_a_batch_of_starts_equals_starts_one_by_one(problem, settings):
    expected = one_by_one(problem, 3, 3, settings)
    trained = train(make_student, problem, settings, starts=3, iterations=3, seed=7)
    for index, student in enumerate(expected):
        for name, value in student.named_parameters():
            torch.testing.assert_close(trained.students.parameters[name][index], value, rtol=1e-3, atol=1e-5)


def test_the_ramp_falls_from_1_to_0_over_its_share_of_each_period():
    assert [ramped([8, 0.5], iteration) for iteration in range(10)] == [1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 1, 0.75]


def test_the_path_leads_from_the_starts_to_the_ends(problem):
    trained = train(make_student, problem, KD, starts=2, iterations=3, seed=7)
    torch.manual_seed(7)
    first = Starts([make_student(), make_student()]).flat()
    assert torch.equal(trained.path[0], first)
    assert torch.equal(trained.path[-1], trained.students.flat())
    assert len(trained.path) == 4


def test_a_scaled_loss_is_a_larger_rate_with_less_decay_and_steps_lower_the_rate(problem):
    """One step each, so that momentum plays no part: after one iteration of three passes the rate is a tenth."""
    plain, scaled, stepped = (
        train(make_student, problem, {**KD, **more}, starts=1, iterations=2, seed=7).path
        for more in ({}, {"loss_scale": 4.0}, {"steps": [0.5]})
    )
    assert torch.equal(stepped[1], plain[1])
    assert (stepped[2] - stepped[1]).norm() < 0.3 * (plain[2] - plain[1]).norm()
    assert (scaled[1] - scaled[0]).norm() > 2 * (plain[1] - plain[0]).norm()


def test_parameters_are_held_within_their_bounds(problem):
    free = train(make_student, problem, KD, starts=2, iterations=1, seed=7).path[-1]
    held = train(make_student, problem, KD, starts=2, iterations=1, seed=7, bounds=(-0.1, 0.2)).path[-1]
    assert free.min() < -0.1
    assert free.max() > 0.2
    assert held.min() == pytest.approx(-0.1)
    assert held.max() == pytest.approx(0.2)


def test_cross_entropy_ignores_the_teacher(problem):
    other = problem._replace(teacher_logits=-problem.teacher_logits)
    ends = [train(make_student, each, EACH["CE"], starts=2, iterations=2, seed=0) for each in (problem, other)]
    for name, value in ends[0].students.parameters.items():
        assert torch.equal(value, ends[1].students.parameters[name])


def test_all_methods_begin_with_the_same_starts(problem):
    begun = {
        name: train(make_student, problem, settings, starts=2, iterations=1, seed=3).path[0]
        for name, settings in EACH.items()
    }
    for path in begun.values():
        assert torch.equal(path, begun["CE"])
    assert not torch.equal(*begun["CE"])


def test_minibatches_give_every_method_the_same_student_steps(problem):
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append((torch.is_grad_enabled(), len(x)))
            return super().forward(x)

    for settings in EACH.values():
        calls.clear()
        train(lambda: Counted(2, 3), problem, settings, starts=2, iterations=2, seed=0, batch_size=10)
        assert [size for grad, size in calls if grad] == [10, 10, 4] * PASSES * 2


def test_the_drawn_loss_is_the_trained_one(problem):
    torch.manual_seed(0)
    logits, guide = torch.randn(24, 3), torch.rand(24)
    own = {**KD, "top_k": 2}
    terms = functional.disk_terms(
        logits, problem.teacher_logits, problem.y, guide.logit(), distill_weight=0.9, multiplier=1.0, budget=0.05, **own
    )
    torch.testing.assert_close(student_loss(logits, problem, own, guide), terms.student_loss)
    at_zero = student_loss(logits, problem, own, torch.full((24,), 1e-30))
    torch.testing.assert_close(at_zero, student_loss(logits, problem, own, None))


def test_an_interval_by_hand():
    module = intervals.Intervals(torch.tensor([[2.0, 3.0]]))
    assert module.place.tolist() == [[2.0, 1.0]]  # start and width
    x = torch.tensor([2.5, 2.0, 8.0])
    inside = 1 / (1 + math.exp(-3.5)) - 1 / (1 + math.exp(3.5))
    edge = 0.5 - 1 / (1 + math.exp(7))
    expected = torch.tensor([inside, edge, 0.0])
    torch.testing.assert_close(module(x)[:, 1].exp(), expected + 0.003, rtol=1e-5, atol=1e-6)  # the loss is bounded
    torch.testing.assert_close(module(x)[:, 0].exp(), 1 - expected + 0.003, rtol=1e-5, atol=1e-6)


def test_intervals_start_between_0_and_3_and_end_between_3_and_9():
    torch.manual_seed(0)
    ends = torch.cat([intervals.random_ends() for _ in range(2000)])
    for values, low, high in ((ends[:, 0], 0, 3), (ends[:, 1], 3, 9)):
        assert values.min() >= low
        assert values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, rel=0.03)


def test_interval_data_are_balanced_and_labelled_by_the_two_intervals():
    x, y = intervals.sample(1000, 0)
    assert y.sum() == 500
    inside = ((x > 2) & (x < 3)) | ((x > 5) & (x < 7))
    assert torch.equal(inside.long(), y)
    assert not torch.equal(x, intervals.sample(1000, 1)[0])


def test_the_interval_teacher_has_the_true_ends_and_shows_both_intervals():
    data = intervals.problem(0)
    values = data.teacher_features
    for index, (low, high) in enumerate(intervals.BLUE):
        assert values[(data.x > low + 0.2) & (data.x < high - 0.2), index].min() > 0.8
        assert values[(data.x < low - 0.5) | (data.x > high + 0.5), index].max() < 0.05
    assert (data.teacher_logits.argmax(1) == data.y).float().mean() > 0.98


def test_interval_minima_are_told_apart_by_their_ends():
    places = ([2.1, 3.2], [1.8, 7.3], [5.3, 6.8], [3.5, 6.9])
    modules = [intervals.Intervals(torch.tensor([ends])) for ends in places]
    assert intervals.classify(Starts(modules), None, 0).tolist() == [1, 2, 3, 0]


def test_starts_are_nearest_where_the_middle_of_their_ends_is_narrowest():
    guide = torch.where(intervals.problem(0).x < 3, 0.25, 0.75).expand(11, -1)
    # starts and widths: a from 0 to 1 and b from 3 to 5, then a tenth of that, then wide again
    share = torch.linspace(0, 1, 11)
    ways = [torch.stack([scale * share, 3 + scale * share], 1) for scale in (1.0, 0.1, 1.0)]
    late = [torch.zeros(11, 2)] * 100  # after the first half of the first period
    path = torch.stack([*ways, *[ways[0]] * (intervals.PERIOD // 2 - 2), *late])
    found = intervals.describe({}, {row: types.SimpleNamespace(path=path, guide=guide) for row in rows.ROWS})
    for row in (rows.KD_PLAIN, rows.DISK, rows.UNIFORM):
        each = found["continuation"][row]
        assert each["middle_80_percent_at_the_start"] == pytest.approx((0.8 + 1.6) / 2)
        assert each["narrowest"] == pytest.approx(0.12)
        assert each["iteration"] == 1
        assert each["median_ends_there"] == pytest.approx([0.05, 3.1])
    assert list(found["continuation"]["g_at_the_end"].values()) == [0.25, 0.25, 0.75, 0.75, 0.75]
    assert sum(found["continuation"]["kd_from_there"].values()) == 11


def test_kd_goes_on_from_the_given_places():
    places = torch.tensor([[2.0, 1.0], [2.0, 5.0], [5.0, 2.0]])  # starts and widths of A, B and C, which are minima
    assert list(intervals.kd_from(places).values()) == [0, 1, 1, 1]


def test_gaussian_clusters_follow_the_papers_grid():
    x, y = gaussians.sample(6000, 0)
    centres = {(0, 0): 0, (1.5, 0): 1, (3, 0): 2, (0, 1.5): 1, (1.5, 1.5): 2, (3, 1.5): 0}
    nearest = torch.cdist(x, torch.tensor(list(centres), dtype=torch.float32)).argmin(1)
    agree = torch.tensor(list(centres.values()))[nearest] == y
    assert agree.float().mean() > 0.995  # two clusters of .2236 in standard deviation, 1.5 apart, hardly touch
    assert x[:, 0][nearest == 0].var().item() == pytest.approx(0.05, rel=0.1)


def test_gaussian_minima_are_told_apart_by_accuracy_rounded_to_a_tenth(monkeypatch):
    accuracy = torch.tensor([0.3, 0.67, 0.744, 0.756, 0.844, 0.856, 0.944, 0.956, 1.0])
    monkeypatch.setattr(gaussians, "accuracies", lambda *_: accuracy)
    assert gaussians.classify(None, None, 0).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_a_teacher_that_fails_its_own_data_is_trained_again(monkeypatch):
    tried = []

    def trained_teacher(x, y, seed):
        tried.append(seed)
        return lambda x: F.one_hot(y if seed >= 2000 else torch.zeros_like(y), 3).float()

    monkeypatch.setattr(gaussians, "trained_teacher", trained_teacher)
    assert gaussians.teacher_of.__wrapped__(7) is not None
    assert tried == [7, 1007, 2007]
    monkeypatch.setattr(gaussians, "TEACHERS", 2)
    with pytest.raises(RuntimeError, match="expected a teacher with 95%, got none in 2 starts, 33% the last"):
        gaussians.teacher_of.__wrapped__(7)


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
    seen = [table1.run(toy, DISK, starts=3, seed=1, dry_run=True) for _ in range(2)]
    assert torch.equal(seen[0].guide, seen[1].guide)
    assert sum(table1.counts(toy, seen[0], 1)) == 3
    assert seen[0].guide.shape == (3, toy.make_problem(1).x.shape[0])


def test_changes_reach_the_guide_and_leave_the_original():
    found = table1.changed(DISK, {"top_k": 1, "guide.lr": 0.5})
    assert found == {**DISK, "top_k": 1, "guide": {"hidden_dims": [5], "lr": 0.5}}
    assert DISK["guide"] == {"hidden_dims": [5]}


def test_the_best_of_n_starts_by_hand():
    # one start: 3/4 bad, 1/4 good; the best of two is bad with 9/16
    assert best_of.best_of((3, 1), 2) == pytest.approx([56.25, 43.75])
    assert best_of.best_of((73, 12, 9, 6), 1) == pytest.approx([73, 12, 9, 6])
    assert best_of.deviance((2, 0, 6), (4, 1, 6)) == pytest.approx(2 * 2 * math.log(0.5))
    assert best_of.deviance((1, 1), (0, 2)) == math.inf
    assert best_of.nearest((3, 1), best_of.best_of((3, 1), 7)) == 7


def test_the_arithmetic_starts_from_the_papers_and_from_our_cross_entropy():
    found = gaussians.describe(committed("gaussians.json")["rows"], {})["best_of"]
    predicted = [row["predicted"] for row in found.values()]
    assert predicted[0] == pytest.approx([0.89, 7.84, 30.79, 60.47], abs=0.01)  # .85^15 - .73^15, and so on
    assert predicted[1] == pytest.approx([0, 0.01, 2.93, 97.06], abs=0.01)
    ours = committed("gaussians.json")["rows"][rows.CE]["counts"]
    below = 1 - ours[gaussians.MINIMA[-1]] / sum(ours.values())
    assert predicted[2][-1] == pytest.approx(100 * (1 - below**15))
    assert [row["n"] for row in found.values()] == [15, 57, 15]


def test_wilsons_interval():
    # 90 of 100: centre (p + z^2/2n) / (1 + z^2/n), from the formula with z = 1.959964
    z, n, p = 1.959964, 100, 0.9
    centre, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    expected = [100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)]
    assert table1.interval(90, 100) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
class TestCommitted:
    def test_counts_are_of_all_starts_of_five_sets_worst_minimum_first(self, toy):
        results = committed(f"{toy.name}.json")
        assert list(results["rows"]) == list(rows.ROWS) == list(toy.rows)
        assert (results["sets"], results["starts_per_set"]) == (5, 100)
        for row in results["rows"].values():
            assert list(row["counts"]) == list(toy.minima)
            assert [sum(ends) for ends in row["per_set"]] == [100] * 5
            assert [sum(ends) for ends in zip(*row["per_set"], strict=True)] == list(row["counts"].values())
            for name, count in row["counts"].items():
                assert row["interval_95"][name] == pytest.approx(table1.interval(count, 500))

    def test_settings_are_the_given_ones_or_the_best_of_the_search(self, toy):
        results, found = committed(f"{toy.name}.json"), committed(f"{toy.name}_search.json")
        for row, settings in table1.settings_of(toy, found).items():
            assert results["rows"][row]["settings"] == json.loads(json.dumps(settings))
        assert set(found) == set(toy.trials) == {row for row, own in toy.rows.items() if own is None}
        for row, trials in toy.trials.items():
            assert [each["settings"] for each in found[row]["rows"]] == json.loads(json.dumps(trials))
            assert found[row]["trials"] == len(trials) == results["rows"][row]["trials"]
            best = max(each["counts"][toy.minima[-1]] for each in found[row]["rows"])
            assert found[row]["counts"][toy.minima[-1]] == best

    def test_no_trial_is_made_twice_and_kd_has_as_many_as_disk(self, toy):
        for trials in toy.trials.values():
            assert len({json.dumps(settings, sort_keys=True) for settings in trials}) == len(trials)
        assert len(toy.trials[rows.KD]) >= len(toy.trials.get(rows.DISK, ()))

    def test_the_report_uses_other_data_and_starts_than_the_search(self, toy):
        assert not set(table1.REPORT_SEEDS) & set(table1.SEARCH_SEEDS)
        assert not torch.equal(toy.make_problem(0).x, toy.make_problem(table1.SEARCH_SEEDS[0]).x)

    def test_the_page_repeats_the_tables(self, toy):
        results, ablation = committed(f"{toy.name}.json"), committed(f"{toy.name}_ablation.json")
        assert shown("table1.md", toy.name) == tables.counts(toy, results)
        assert shown("table1.md", f"{toy.name}-ablation") == tables.ablation(ablation)
        module = {"intervals": intervals, "gaussians": gaussians}[toy.name]
        assert list(ablation["rows"]) == list(module.ABLATIONS)
        assert shown("table1.md", f"{toy.name}-remarks") == module.remarks(results)
        _, _, *rows_shown = shown("table1.md", "table1").splitlines()
        assert len(rows_shown) == 2
        assert tables.summary(toy, results) in rows_shown


def test_what_is_claimed_of_the_intervals_is_in_the_committed_counts():
    results = committed("intervals.json")
    share = {row: each["counts"]["C [5, 7], global"] / 500 for row, each in results["rows"].items()}
    assert share[rows.DISK] >= 0.9
    assert share[rows.CE] <= share[rows.KD] < share[rows.UNIFORM]
    assert results["rows"][rows.KD]["trials"] == 36  # all of the paper's ranges, but for ce_weight 1, which is CE


def test_the_settings_lie_in_the_papers_ranges():
    given, drawn = intervals.TOY.rows[rows.DISK], rows.DISK_RANGES
    for settings in ({key: [value] for key, value in given.items() if key != "multiplier"}, drawn):
        assert set(settings["temperature"]) | set(settings["student_temperature"]) <= {1, 2, 4}
        assert set(settings["ce_weight"]) <= {0.0, 0.1, 0.5, 0.9, 1.0}
        assert set(settings["top_k"]) <= {1, 2, 3}
        assert set(settings["budget"]) <= {0.1, 0.05, 0.0}
        assert set(settings["period"]) <= {20, 50}
    assert given["multiplier"][0] in drawn["multiplier_min"]
    assert given["multiplier"][1] in drawn["multiplier_max"]
    assert set(drawn["multiplier_min"]) <= {0.01, 0.1, 1, 5, 10}
    assert set(drawn["multiplier_max"]) <= {1, 5, 10, 20, 50, 100, 1000}


def test_hard_labels_decide_where_the_teacher_is_silent(problem):
    """At ce_weight 1 the student's loss is cross-entropy, whatever the guide."""
    logits = torch.randn(24, 3)
    value = student_loss(logits, problem, {**RAMP, "ce_weight": 1.0}, torch.rand(24))
    torch.testing.assert_close(value, F.cross_entropy(logits, problem.y))
