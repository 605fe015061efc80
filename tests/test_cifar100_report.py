"""The CIFAR-100 report row by row, its partial tables, and the conditions: resumable, paired, on the right images."""

import json
import sys

import cifar100
import pytest
import torch
from small_images import conditions, data, report, shown, trials
from small_images.experiment import Experiment
from small_images.final import Final
from small_images.methods import KD, Batch, make_method
from small_images.resnet import ResNet
from small_images.training import Recipe, Run
from small_images.views import Views, outputs_of

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, presets
from disk_plugin.uniform import UniformGuide

pytestmark = pytest.mark.filterwarnings("ignore:the guide is dead")
SEARCH = {
    "chosen": {
        "kd": {"settings": {"ce_weight": 0.1, "temperature": 2.0}},
        "disk": {"settings": {"ce_weight": 0.1, "multiplier": 50.0, "budget": 0.1}},
    }
}


@pytest.fixture
def experiment(monkeypatch):
    """Return what makes the experiment of a command on 200 random images."""
    synthetic = data.synthetic
    monkeypatch.setattr(data, "synthetic", lambda samples=240: synthetic(samples))
    for name in ("KD_TRIALS", "DISK_TRIALS"):  # which a dry run shortens
        monkeypatch.setattr(trials, name, getattr(trials, name))

    def made(out, *flags):
        monkeypatch.setattr(sys, "argv", ["cifar100.py", "--dry-run", "--out", str(out), *flags])
        args = cifar100.arguments()
        args.held_out = 40
        return Experiment(args)

    return made


def batch():
    return Batch(torch.empty(0), torch.randint(100, (16,)), torch.randn(16, 100), torch.randn(16, 64), torch.arange(16))


def of_row(name, temperature=2.0):
    method, settings = trials.rows(temperature)[name]
    return make_method(method, settings, feature_dim=64, epochs=6, seed=0, budget=0.7)


def test_disk_and_uniform_set_nothing_but_the_temperature():
    built = of_row("disk").disk
    expected = DiSKLoss(GuideHead(100, 64), temperature=2.0)
    assert repr(built) == repr(expected)
    assert of_row("uniform").disk.guide.discount == "auto"
    assert of_row("uniform-constant").disk.guide.ends == (0.03, 0.03)
    for name in ("uniform", "uniform-constant"):
        method = of_row(name)
        assert method.optimizer is None
        assert repr(method.disk) == repr(DiSKLoss(method.disk.guide, temperature=2.0))


def test_the_papers_row_is_the_preset_with_the_warm_starts_error_as_its_budget():
    method = of_row("paper-replay")
    guide = GuideHead(100, 64, **presets.PAPER["guide"])
    expected = DiSKLoss(guide, **presets.PAPER["loss"], budget=0.7)
    DualScheduler(expected, epochs=2, **presets.PAPER["dual"])
    assert repr(method.disk) == repr(expected)
    assert method.disk.budget == 0.7
    assert method.dual.epochs == 2
    assert (method.dual.multiplier_min, method.dual.multiplier_max) == presets.PAPER["dual"]["multiplier"]


@pytest.mark.parametrize("name", ["disk-replay", "disk-alternating"])
def test_the_students_passes_leave_the_guides_batch_norm_alone(name):
    settings = {"loss": {"multiplier": 50.0, "budget": 0.1}, "guide": {"norm": "batch"}}
    method = make_method(name, settings, feature_dim=64, epochs=6, seed=0, budget=0.7)
    before = {key: value.clone() for key, value in method.disk.guide.state_dict().items()}
    method(torch.randn(16, 100, requires_grad=True), batch()).backward()
    assert method.disk.guide.training
    assert all(torch.equal(value, before[key]) for key, value in method.disk.guide.state_dict().items())


def test_an_interrupted_report_goes_on_bit_for_bit_and_repeats_no_row(tmp_path, experiment, monkeypatch):
    flags = ["--methods", "kd", "disk", "uniform", "paper-replay", "--no-third"]
    whole = Final(experiment(tmp_path / "whole", *flags), SEARCH)
    whole.train([0])
    fit_epoch, trained = Run.fit_epoch, []

    def stopped(run):
        if len(trained) == stop_at:
            raise KeyboardInterrupt
        trained.append((run.folder.name, run.epoch))
        fit_epoch(run)

    stop_at = 2 + 2 + 3 + 3 + 3 + 1  # after teacher, warm start, three rows and an epoch of the last
    monkeypatch.setattr(Run, "fit_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        Final(experiment(tmp_path / "half", *flags), SEARCH).train([0])
    found = Final(experiment(tmp_path / "half", *flags, "--collect"), SEARCH).collect()
    assert list(found["methods"]) == ["kd", "disk", "uniform"]
    trained, stop_at = [], None
    again = Final(experiment(tmp_path / "half", *flags), SEARCH)
    again.train([0])
    assert trained == [("final-resnet10-xxs-3-seed0-paper-replay", epoch) for epoch in (1, 2)]
    assert again.collect()["logs"] == whole.collect()["logs"]
    assert list(again.collect()["methods"]) == flags[1:5]


def test_rows_that_trained_side_by_side_are_taken_unless_their_settings_changed(tmp_path, experiment, monkeypatch):
    together = ["--methods", "ce", "kd", "kd-1", "--no-third"]
    Final(experiment(tmp_path, *together, "--side-by-side", "3"), SEARCH).train([0])
    assert (tmp_path / "final-resnet10-xxs-3-seed0-ce-kd-kd-1").is_dir()
    other = {"chosen": {**SEARCH["chosen"], "kd": {"settings": {"ce_weight": 0.1, "temperature": 3.0}}}}
    made = experiment(tmp_path, *together)
    assert list(Final(made, other).collect()["methods"]) == ["ce", "kd-1"]
    final = Final(made, SEARCH)
    monkeypatch.setattr(Run, "fit_epoch", lambda run: pytest.fail(f"{run.folder} trained again"))
    final.train([0])
    assert list(final.collect()["methods"]) == ["ce", "kd", "kd-1"]


def test_collect_trains_nothing(tmp_path, experiment, monkeypatch):
    with pytest.raises(RuntimeError, match=r"--collect expects a trained teacher in .*teacher-resnet10-s-2, got 0"):
        experiment(tmp_path, "--collect")
    experiment(tmp_path)
    monkeypatch.setattr(Run, "fit_epoch", lambda run: pytest.fail("trained"))
    found = Final(experiment(tmp_path, "--collect", "--converged"), SEARCH).collect()
    assert found["methods"] == {}
    assert found["warm_start"] == []
    assert report.table(found).endswith("warm start .")


def runs(**last):
    return {int(seed[1:]): [{"accuracy": 0.0}, {"accuracy": value}] for seed, value in last.items()}


def test_a_partial_table_says_which_seeds_and_pairs_only_those_that_both_have():
    logs = {
        "kd": runs(s0=10.0, s1=12.0, s2=14.0),
        "kd-1": runs(s0=11.0, s2=13.5),
        "disk": runs(s0=12.0, s1=13.0, s2=16.5),
        "uniform": runs(s1=11.0),
    }
    kd = report.better_kd({name: logs[name] for name in ("kd", "kd-1")})
    assert kd == "kd-1"  # 12.25 against 12 on the seeds 0 and 2
    found = report.differences(logs, kd)
    assert found["disk - kd-1"]["values"] == [1.0, 3.0]
    assert found["disk - kd-1"]["seeds"] == [0, 2]
    half = 12.706205 * 2**0.5 / 2**0.5  # t(.975, 1) std / sqrt(n)
    assert found["disk - kd-1"]["interval_95"] == pytest.approx([2 - half, 2 + half])
    assert "uniform - kd-1" not in found
    found |= report.differences(logs, "uniform")
    assert found["disk - uniform"]["interval_95"] is None
    methods = {name: report.summary(each, {"student": 60, "extra_forwards": 0}) for name, each in logs.items()}
    results = {"protocol": {"seeds": 3}, "teacher": 60.0, "warm_start": [1.0], "methods": methods}
    table = report.table(results | {"kd": kd, "kd_rows": ["kd", "kd-1"], "differences": found})
    assert "| kd-1 | 11.00 / 13.50 (2 of 3 seeds: 0, 2) | 12.25 ± 1.77 |  |" in table
    assert "| disk | 12.00 / 13.00 / 16.50 | 13.83 ± 2.36 | +2.00 (-10.71 to +14.71) |" in table
    assert "| uniform | 11.00 (1 of 3 seeds: 1) | 11.00 |  |" in table
    assert table.endswith("which is kd-1. What the trained guide adds: disk minus uniform +2.00 (one seed).")


def test_without_a_common_seed_the_kd_of_most_seeds_is_taken():
    assert report.better_kd({"kd": runs(s0=1.0, s1=1.0), "kd-1": runs(s2=9.0)}) == "kd"
    assert report.better_kd({}) is None


def test_a_checkpoint_from_before_a_field_of_the_recipe_goes_on(tmp_path):
    train = data.synthetic(240)[0]

    def run(**changed):
        recipe = Recipe("resnet10-xxs", 2, 3, batch_size=40, progress=False, **changed)
        return Run(recipe, {"kd": KD()}, None, Views(train, 2, teacher, None), torch.arange(80), train, tmp_path)

    torch.manual_seed(1)
    teacher = ResNet("resnet10-s").eval()
    run().fit_epoch()
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    recipe, *others = json.loads(state["settings"])
    assert recipe.pop("num_classes") == 100
    assert recipe.pop("features") is None
    torch.save(state | {"settings": json.dumps([recipe, *others])}, path)
    assert run().epoch == 1
    with pytest.raises(RuntimeError, match=r"expected .*'features': 8.* got .*'features': None"):
        run(features=8)


def test_a_bottleneck_bounds_the_rank_of_the_logits_at_the_same_body():
    torch.manual_seed(0)
    whole = ResNet("resnet10-xxs")
    torch.manual_seed(0)
    narrow = ResNet("resnet10-xxs", features=4).eval()
    for key, value in whole.blocks.state_dict().items():
        assert torch.equal(value, narrow.blocks.state_dict()[key])
    with torch.no_grad():
        logits = narrow(torch.randn(64, 3, 16, 16)) - narrow.classifier.bias
    assert torch.linalg.matrix_rank(logits.double(), rtol=1e-4) == 4


def test_every_superclass_has_five_classes_in_the_order_of_their_names():
    superclass = shown.superclass_of()
    assert torch.equal(superclass.bincount(), torch.full((20,), 5))
    apple, aquarium_fish, baby, worm = superclass[[0, 1, 2, 99]].tolist()  # of alphabetical names
    assert (apple, aquarium_fish, baby, worm) == (4, 1, 14, 13)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_superclass_has_the_sum_of_its_classes_probabilities(corrected):
    train = data.synthetic(240)[0]
    teacher = ResNet("resnet10-s").eval()
    views = shown.Shown(Views(train, 2, teacher, None), pixels=16, superclasses=True, corrected=corrected)
    images, (logits, features) = views(0, 1)
    whole = data.augmented(train.images, 1)
    expected, expected_features = outputs_of(teacher, whole)
    expected = shown.put_right(expected, train.labels) if corrected else expected
    assert images.shape[-2:] == (16, 16)
    mean = whole.float().unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
    assert (images.float() - mean).abs().max() <= 0.5
    assert torch.equal(features, expected_features)  # of the whole images
    probabilities = torch.zeros(len(train.labels), 20)
    probabilities.index_add_(1, shown.superclass_of(), expected.float().softmax(1))
    torch.testing.assert_close(logits.float().softmax(1), probabilities, atol=2e-3, rtol=0.01)
    assert torch.equal(views.train.labels, shown.superclass_of()[train.labels])


def test_a_corrected_teacher_keeps_its_logits_and_gives_the_label_the_largest():
    logits, labels = torch.randn(50, 100), torch.randint(100, (50,))
    right = shown.put_right(logits, labels)
    assert torch.equal(right.argmax(1), labels)
    assert torch.equal(right.sort(1).values, logits.sort(1).values)
    unchanged = logits.argmax(1) == labels
    assert torch.equal(right[unchanged], logits[unchanged])


def test_the_conditions_write_every_cell_and_train_it_once(tmp_path, experiment, monkeypatch):
    chosen = ("8 features", "20 superclasses", "a fifth of the images", "as it is, Algorithm 1")
    only = [list(conditions.CONDITIONS).index(name) for name in chosen]
    made, kept = experiment(tmp_path, "--conditions"), []
    found = conditions.conditions(made, only, lambda so_far: kept.append(json.loads(json.dumps(so_far))))
    cells = [sum(len(each["cells"]) for each in so_far["conditions"].values()) for so_far in kept]
    assert cells == list(range(1, 9))  # two seeds
    assert [list(so_far["conditions"]) for so_far in kept[:4]] == [list(chosen[:i]) for i in range(1, 5)]
    kd = found["conditions"]["8 features"]["kd"]
    assert kd in ("kd-1", "kd-2")
    cell = found["conditions"]["8 features"]["cells"][1]["methods"]
    values = found["conditions"]["8 features"]["differences"][f"auto-1 - {kd}"]["values"]
    assert values[1] == pytest.approx(cell["auto-1"]["held_out"] - cell[kd]["held_out"])
    table = conditions.conditions_table(found)
    forms, default, passes = table.split("\n\n")
    assert [row.split(" | ")[0] for row in default.splitlines()[2:]] == [
        *(f"| {name}" for name in chosen[1:3]),
        "| mean",
    ]
    assert f"| {values[0]:+.2f} / {values[1]:+.2f} |" in forms
    gaps = [found["conditions"][name] for name in chosen[1:3]]
    gaps = [each["differences"][f"uniform-1 - {each['kd']}"]["values"] for each in gaps]
    assert [cell.strip() for cell in default.splitlines()[-1].split("|")][5] == f"{sum(map(sum, gaps)) / 4:+.2f}"
    assert passes.splitlines()[2].startswith(f"| {chosen[3]} | ")
    monkeypatch.setattr(Run, "fit_epoch", lambda run: pytest.fail("trained again"))
    assert conditions.conditions(made, only, lambda so_far: None) == found
    for part in (only[1:2], []):  # what has finished is reported regardless
        assert conditions.conditions(made, part, lambda so_far: None) == found


def test_earlier_results_of_the_conditions_are_reported_and_not_trained_again(tmp_path, experiment, monkeypatch):
    only = [list(conditions.CONDITIONS).index("4 features")]
    earlier = conditions.conditions(experiment(tmp_path / "one", "--conditions"), only, lambda so_far: None)
    earlier = json.loads(json.dumps(earlier))
    del earlier["conditions"]["4 features"]["seeds"][0], earlier["conditions"]["4 features"]["cells"][0]
    earlier["protocol"]["machine"], machine = "another", earlier["protocol"]["machine"]
    made, kept = experiment(tmp_path / "two", "--conditions"), []
    found = conditions.conditions(made, only, kept.append, earlier)
    assert len(kept) == 1  # the cell that lacked
    assert found["conditions"]["4 features"]["seeds"] == [100, 101]
    assert found["conditions"]["4 features"]["cells"][1] == earlier["conditions"]["4 features"]["cells"][0]
    assert found["protocol"]["machine"] == f"another; {machine}"
    monkeypatch.setattr(Run, "fit_epoch", lambda run: pytest.fail("trained again"))
    assert conditions.conditions(experiment(tmp_path / "two", "--conditions"), only, kept.append, found) == found


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protocol": {"epochs": 7}}, "expected earlier results of the protocol.* got.*'epochs': 7.*another --out"),
        (
            {"conditions": {"9 features": {"seeds": [100], "cells": [{"methods": {"ce": {}}}]}}},
            "'9 features' with None",
        ),
        ({"conditions": {"4 features": {"seeds": [100], "cells": [{"methods": {"ce": {}}}]}}}, r"got \['ce'\]"),
    ],
)
def test_earlier_results_of_something_else_are_refused(tmp_path, experiment, changed, message):
    made = experiment(tmp_path, "--conditions")
    earlier = conditions.conditions(made, [], lambda so_far: None)
    earlier = {key: value | changed.get(key, {}) for key, value in earlier.items()}
    with pytest.raises(ValueError, match=message):
        conditions.conditions(made, [], lambda so_far: None, earlier)


def test_an_unfinished_condition_is_not_reported_unless_it_is_asked_for(tmp_path, experiment, monkeypatch):
    made, fit_epoch = experiment(tmp_path, "--conditions"), Run.fit_epoch
    four = list(conditions.CONDITIONS).index("4 features")

    def stopped(run):
        if run.folder.name.startswith("condition-4-features") and run.epoch == 1:
            raise KeyboardInterrupt
        fit_epoch(run)

    monkeypatch.setattr(Run, "fit_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        conditions.conditions(made, [0, four], lambda so_far: None)
    assert list(conditions.conditions(made, [], lambda so_far: None)["conditions"]) == ["8 features"]
    monkeypatch.setattr(Run, "fit_epoch", fit_epoch)
    found = conditions.conditions(made, [four], lambda so_far: None)["conditions"]
    assert {name: each["seeds"] for name, each in found.items()} == {"8 features": [100], "4 features": [100, 101]}


def test_conditions_of_one_student_share_its_warm_start(tmp_path, experiment):
    made = experiment(tmp_path, "--conditions")
    names = ("as it is (16 features)", "a teacher that is always right", "a weaker teacher", "as it is, Algorithm 1")
    folders = {conditions.Cell(made, name, 100)._warm_run().folder for name in names}
    assert len(folders) == 1
    other = conditions.Cell(made, "8 features", 100)
    assert other._warm_run().folder not in folders
    held_out = set(data.search_split(200, 40)[1].tolist())
    assert held_out.isdisjoint(other.index.tolist())


def test_the_report_and_the_conditions_run_as_typed(tmp_path, experiment, monkeypatch, capsys):
    monkeypatch.setattr(conditions, "CONDITIONS", {"8 features": conditions.CONDITIONS["8 features"]})
    small = data.synthetic
    monkeypatch.setattr(data, "synthetic", lambda: small(360))  # 200 of its 300 are held out
    for flags in (["--converged", "--only", "1", "--methods", "kd", "uniform"], ["--converged", "--collect"]):
        monkeypatch.setattr(sys, "argv", ["cifar100.py", "--dry-run", "--out", str(tmp_path), *flags])
        cifar100.main()
    found = json.loads((tmp_path / "cifar100_10-s_10-xxs_converged.json").read_text())
    assert {name: row["seeds"] for name, row in found["methods"].items()} == {"kd": [1], "uniform": [1]}
    assert report.table(found) in capsys.readouterr().out
    assert (tmp_path / "cifar100_10-s_10-xxs_converged.png").exists()
    monkeypatch.setattr(sys, "argv", ["cifar100.py", "--dry-run", "--out", str(tmp_path), "--conditions"])
    cifar100.main()
    found = json.loads((tmp_path / "cifar100_10-s_10-xxs_conditions.json").read_text())
    assert found["conditions"]["8 features"]["seeds"] == [100, 101]
    assert conditions.conditions_table(found) in capsys.readouterr().out


def test_the_converged_protocol_is_named_by_one_flag_and_explicit_flags_win(monkeypatch):
    def parsed(*flags):
        monkeypatch.setattr(sys, "argv", ["cifar100.py", "--data", "x.npz", *flags])
        return cifar100.arguments()

    args = parsed("--converged")
    assert (args.warm_epochs, args.epochs, args.third, args.seeds) == (60, 60, False, 3)
    assert args.methods == trials.CONVERGED
    assert parsed("--converged", "--methods", "uniform").methods == ["uniform"]
    assert parsed("--conditions").seeds == 2
    assert isinstance(of_row("uniform").disk.guide, UniformGuide)
