"""The quickstart: stacked students train as single ones do, its search is even, its sentences follow its numbers."""

import copy
import json
import sys
from pathlib import Path

import pytest
import quickstart
import torch
from small_problems import shown
from small_problems.problems import Problem, Split
from small_problems.stacked import KD, CrossEntropy, train_seeds
from small_problems.training import make_disk, new_student, train_disk, train_kd, warm_student

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.uniform import UniformGuide

RESULTS = Path(quickstart.__file__).parent / "results"
SEEDS, PASSES = [3, 4, 5], 3


def committed(name):
    return json.loads((RESULTS / name).read_text())


@pytest.fixture
def problem():
    """100 images of 8 x 8 pixels, three classes, a teacher with five features."""
    splits = [Split(torch.rand(count, 64), torch.randint(3, (count,))) for count in (100, 60, 60)]
    teacher = torch.nn.Sequential(torch.nn.Linear(64, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    features = teacher[:-1](splits[0].x).detach()
    logits = 3 * teacher[-1](features).detach()
    return Problem("small", *splits, logits, features, 50.0, (64, 4, 3), "gelu", 20, teacher)


@pytest.fixture
def starts(problem):
    return [new_student(problem, seed) for seed in SEEDS]


def losses(problem, settings):
    made = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        made.append(make_disk(problem, settings))
    return made


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"discount": 0.2, "ce_weight": 0.1, "temperature": 2.0}])
def test_stacked_seeds_end_elsewhere_than_single_runs_of_the_same_loop(problem, starts, uniform, settings):
    settings = quickstart.uniform(settings) if uniform else settings
    expected = [train_disk(problem, start, settings, seed, 4) for start, seed in zip(starts, SEEDS, strict=True)]
    students = train_seeds(problem, starts, losses(problem, settings), SEEDS, 4)
    for split in ("train", "validation", "test"):
        measured = quickstart.scored(students, getattr(problem, split))
        assert measured == pytest.approx([getattr(one, split) for one in expected])


def test_stacked_ce_and_kd_end_elsewhere_than_single_ones(problem, starts):
    expected = [warm_student(problem, seed, PASSES) for seed in SEEDS]
    students = train_seeds(problem, starts, [CrossEntropy() for _ in SEEDS], SEEDS, PASSES)
    for mine, other in zip(students, expected, strict=True):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)
    settings = {"ce_weight": 0.3, "temperature": 2.0}
    singles = [train_kd(problem, each, [settings], seed, PASSES)[0] for each, seed in zip(starts, SEEDS, strict=True)]
    students = train_seeds(problem, starts, [KD(**settings) for _ in SEEDS], SEEDS, PASSES)
    assert quickstart.scored(students, problem.test) == pytest.approx([one.test for one in singles])


def test_training_moves_the_start_or_leaves_a_seeds_objects_behind_its_stack(problem, starts):
    before = copy.deepcopy([start.state_dict() for start in starts])
    disks = losses(problem, {"discount": 0.2})
    guides = copy.deepcopy([disk.guide.state_dict() for disk in disks])
    seen = []
    train_seeds(problem, starts, disks, SEEDS, PASSES, lambda students: seen.append(disks[1].level.log_guide.item()))
    for start, old in zip(starts, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in start.state_dict().items())
    for disk, old in zip(disks, guides, strict=True):
        assert any(not torch.equal(value, old[name]) for name, value in disk.guide.state_dict().items())
        assert disk.level.progress == 1
    assert len(set(seen)) == PASSES
    assert len({disk.level.log_guide.item() for disk in disks}) == len(SEEDS)


def test_untuned_disk_is_anything_but_readmes_loss(problem):
    found = {method: {"settings": {"temperature": 3.0, "ce_weight": 0.7}} for method in quickstart.SEARCHED}
    settings = quickstart.settings_of(found)[quickstart.UNTUNED]
    assert settings == {"temperature": 3.0}
    (disk,) = quickstart.make_losses(problem, quickstart.UNTUNED, settings, [7])
    torch.manual_seed(7)
    assert repr(disk) == repr(DiSKLoss(GuideHead(3, 5), temperature=3.0))


def test_the_automatic_targets_settings_are_dropped(problem):
    settings = {"discount": "auto", "share": 0.5, "over": 0.7}
    uniform = make_disk(problem, quickstart.uniform(settings)).guide
    for level in (make_disk(problem, settings).level, uniform):
        assert (level.discount, level.share, level.over) == ("auto", 0.5, 0.7)
    assert isinstance(uniform, UniformGuide)


def test_a_method_was_searched_with_more_trials_than_another():
    assert {method: len(trials) for method, trials in quickstart.TRIALS.items()} == dict.fromkeys(
        quickstart.SEARCHED, 36
    )
    for name in quickstart.SETUPS:
        chosen = committed("quickstart_search.json")[name]
        assert set(chosen) == set(quickstart.SEARCHED)
        for method, found in chosen.items():
            trials = quickstart.TRIALS[method]
            assert found["trials"] == len(found["validation"]) == len({json.dumps(each) for each in trials}) == 36
            best = max(range(36), key=found["validation"].__getitem__)
            assert found["settings"] == trials[best]


def test_the_default_target_is_in_no_trial():
    level = DiSKLoss(GuideHead(3)).level
    assert {"discount": level.discount, "share": level.share, "over": level.over} in quickstart.TARGETS


def test_the_committed_results_used_other_settings_than_the_committed_ones():
    for name, found in committed("quickstart_search.json").items():
        methods = committed("quickstart.json")["problems"][name]["methods"]
        assert {method: row["settings"] for method, row in methods.items()} == quickstart.settings_of(found)


def test_search_and_report_share_seeds():
    seeds = committed("quickstart.json")["seeds"]
    assert seeds >= 20
    assert not set(quickstart.SEARCH_SEEDS) & set(range(seeds))


def test_the_committed_differences_are_not_those_of_the_values():
    results = committed("quickstart.json")
    assert results["seeds"] == 20
    for found in results["problems"].values():
        for pair, one in found["differences"].items():
            first, second = (
                torch.tensor(found["methods"][method]["test"], dtype=torch.float64) for method in pair.split(" - ")
            )
            values = first - second
            mean, error = values.mean().item(), values.std().item() / 20**0.5
            half = 2.093024 * error  # t quantile .975 with 19 degrees of freedom
            assert one["mean"] == pytest.approx(mean)
            assert one["interval_95"] == pytest.approx([mean - half, mean + half], abs=1e-5)
        for row in found["methods"].values():
            assert row["mean"] == pytest.approx(sum(row["test"]) / 20)


def test_the_committed_verdicts_do_not_follow_from_the_committed_intervals():
    for name, found in committed("quickstart.json")["problems"].items():
        assert found["verdict"] == quickstart.verdict(name, found["differences"])


@pytest.mark.parametrize(
    ("kd", "uniform", "says"),
    [
        ((1.0, 3.0), (0.5, 1.0), ["DiSK is ahead of KD", "adds to it"]),
        ((-3.0, -1.0), (-2.0, -0.5), ["DiSK is behind KD", "costs"]),
        ((-1.0, 3.0), (-0.5, 1.0), ["cannot be told apart", "adds nothing that can be told"]),
    ],
)
def test_the_verdict_contradicts_the_intervals(kd, uniform, says):
    pairs = {"DiSK - KD": kd, "DiSK - UniformGuide": uniform}
    differences = {pair: {"mean": sum(ends) / 2, "interval_95": [*ends]} for pair, ends in pairs.items()}
    sentence = quickstart.verdict("digits", differences)
    assert all(words in sentence for words in says)
    assert sentence.count(".") == 1 + sum(text.count(".") for text in map(quickstart.interval, differences.values()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2 for an interval, got 1"),
        (["--seeds", "0"], "--seeds must be at least 2 for an interval, got 0"),
        (["--seeds", "101"], "--seeds must be at most 100, where those of the search begin, got 101"),
        (["--search", "--dry-run"], "--search writes the settings of the report: not with --dry-run"),
    ],
)
def test_a_bad_flag_is_taken(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *flags])
    with pytest.raises(SystemExit):
        quickstart.arguments()
    assert message in capsys.readouterr().err


def test_a_dry_run_writes_no_table_or_figure(tmp_path, monkeypatch, capsys):
    before = quickstart.SEARCH_FILE.read_text()
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--dry-run", "--out", str(tmp_path)])
    quickstart.main()
    results = json.loads((tmp_path / "quickstart.json").read_text())
    assert quickstart.table(results) in capsys.readouterr().out
    assert list(results["problems"]) == list(quickstart.SETUPS)
    assert (tmp_path / "quickstart.png").stat().st_size > 0
    assert quickstart.SEARCH_FILE.read_text() == before


def test_the_gallery_shows_one_image_twice_or_others_than_those_with_the_largest_discount(problem, starts):
    """The training data are 50 images, each there twice, one after the other half."""
    twice = Split(torch.cat([problem.train.x[:50]] * 2), torch.cat([problem.train.y[:50]] * 2))
    teacher = torch.cat([problem.teacher_logits[:50]] * 2), torch.cat([problem.teacher_features[:50]] * 2)
    problem = problem._replace(train=twice, teacher_logits=teacher[0], teacher_features=teacher[1])
    disks = losses(problem, {"discount": 0.2})
    watch = shown.Watch(problem, disks)
    students = train_seeds(problem, starts, disks, SEEDS, PASSES, watch)
    seen = watch.end(students[0], views=2)
    disks[0].eval()
    teacher = problem.teacher_logits, problem.train.y, problem.teacher_features
    terms = disks[0].terms(students[0](problem.train.x), *teacher, reduction="none")
    expected = terms.discount.view(2, 50).amax(0).sort(descending=True).values[: shown.SHOWN]
    assert [image.discount for image in seen.images] == pytest.approx(expected.tolist())
    student = students[0](problem.train.x).argmax(1)
    for image in seen.images:
        (first, *_) = (problem.train.x.view(-1, 8, 8) == image.pixels).all(2).all(1).nonzero().ravel().tolist()
        assert image.label == problem.train.y[first]
        assert image.student == student[first]
    assert {len(curve) for curve in seen.curves.values()} == {PASSES}
    right = terms.correct.bool()
    last = disks[0].terms(students[0](problem.train.x), *teacher, reduction="none").discount[right].mean()
    alone = shown.Watch(problem, disks[:1])
    alone(students)
    assert alone.epochs[0][0]["discount, right"] == pytest.approx(last.item(), rel=1e-4)
