"""The CIFAR-100 example: networks side by side equal networks apart, views, resume, and what its tables say."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cifar100
import label_noise
import numpy as np
import pytest
import torch
from evidence import PAGES, shown
from small_images import data, report, screening, trials
from small_images.conditions import conditions_table
from small_images.methods import CE, KD, METHODS, Batch, make_method
from small_images.networks import width_of
from small_images.resnet import ResNet, joined, parted
from small_images.training import Recipe, Run
from small_images.views import Views
from torch.nn import functional as F  # noqa: N812

from disk_plugin import functional, presets
from disk_plugin.diagnostics.capacity import ENOUGH_FEATURES, LARGEST_DATA_GAP, SMALLEST_CAPACITY_GAP

RESULTS = Path(cifar100.__file__).parent / "results"


@pytest.fixture(scope="module")
def train():
    return data.synthetic(240)[0]


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    return ResNet("resnet10-s").eval()


def run_of(train, teacher, methods, folder=None, epochs=4):
    recipe = Recipe("resnet10-xxs", epochs, 3, batch_size=40, progress=False)
    return Run(recipe, methods, None, Views(train, 2, teacher, None), torch.arange(120), train, folder)


def disk(name="disk", **settings):
    return make_method(name, {"budget": 0.2, "multiplier": 50.0, **settings}, feature_dim=64, epochs=4, seed=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("xxs", 13020), ("s", 83852), ("m", 320436), ("l", 1252100)],
)
def test_the_family_has_the_papers_sizes(name, parameters):
    assert sum(parameter.numel() for parameter in ResNet(f"resnet10-{name}").parameters()) == parameters


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of .*got 'resnet9'"):
        ResNet("resnet9")


@pytest.mark.parametrize("name", ["resnet10-xxs", "resnet10-xs"])
def test_networks_side_by_side_train_as_they_do_apart(name):
    torch.manual_seed(0)
    apart = [ResNet(name).double() for _ in range(3)]
    together = ResNet(name, copies=3).double()
    together.load_state_dict(joined([model.state_dict() for model in apart]))
    images, labels = torch.randn(8, 3, 32, 32, dtype=torch.double), torch.randint(100, (8,))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4) for model in [*apart, together]]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for scale, model in enumerate(apart):
            ((scale + 1) * F.cross_entropy(model(images), labels)).backward()
        logits = together(images).unflatten(1, (3, 100)).unbind(1)
        sum((scale + 1) * F.cross_entropy(own, labels) for scale, own in enumerate(logits)).backward()
        for optimizer in optimizers:
            optimizer.step()
    for model, state in zip(apart, parted(together.state_dict(), 3), strict=True):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value)


def test_a_view_is_a_function_of_its_number(train):
    before = torch.get_rng_state()
    views = [data.augmented(train.images, number) for number in (0, 1, 0)]
    assert torch.equal(before, torch.get_rng_state())
    assert views[0].dtype == torch.uint8
    assert torch.equal(views[0], views[2])
    # nearly every image differs from itself and from its other view
    for other in (train.images, views[1]):
        assert (views[0] != other).flatten(1).any(1).float().mean() > 0.95


def test_augmentation_keeps_every_image_at_its_place(monkeypatch):
    monkeypatch.setattr(data.v2, "AutoAugment", lambda policy: lambda images: images)
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    bright = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5
    images[bright] = 255
    # crop's padding and Cutout's hole are at most half of an image
    assert torch.equal(data.augmented(images, 3).float().flatten(1).mean(1) > 150, bright)


def test_crop_and_flip_only_move_pixels():
    image = torch.arange(3 * 32 * 32).view(1, 3, 32, 32).remainder(251).to(torch.uint8) + 1
    moved = data._cropped_and_flipped(image.repeat(200, 1, 1, 1), torch.Generator().manual_seed(0))
    padded = F.pad(image, [4] * 4)[0]
    windows = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    allowed = {window.numpy().tobytes() for window in windows} | {w.flip(2).numpy().tobytes() for w in windows}
    seen = {each.contiguous().numpy().tobytes() for each in moved}
    assert seen <= allowed
    assert len(seen) > 60


def test_cutout_fills_a_square_of_sixteen_with_the_mean_colour():
    out = data._with_holes(torch.zeros(300, 3, 32, 32, dtype=torch.uint8), torch.Generator().manual_seed(0))
    hole = (out != 0).all(1)
    assert hole.flatten(1).sum(1).max() == 16 * 16
    assert hole.flatten(1).sum(1).min() >= 8 * 8
    assert data.normalized(out)[hole.unsqueeze(1).expand_as(out)].abs().max() < 0.02


def test_both_file_formats_hold_the_same_images(tmp_path, train):
    import pickle

    images = train.images.permute(0, 2, 3, 1).numpy()
    np.savez(
        tmp_path / "c.npz",
        train_x=images,
        train_y=train.labels.numpy(),
        test_x=images[:9],
        test_y=train.labels[:9].numpy(),
    )
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", len(images)), ("test", 9)):
        rows = train.images[:count].flatten(1).numpy()
        content = {"data": rows, "fine_labels": train.labels[:count].tolist(), "coarse_labels": [0] * count}
        (folder / name).write_bytes(pickle.dumps(content))
    for source in (tmp_path / "c.npz", tmp_path):
        first, second = data.load(source)
        assert torch.equal(first.images, train.images)
        assert torch.equal(first.labels, train.labels)
        assert len(second.labels) == 9


def test_missing_data_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cifar100\.npz or a folder that holds cifar-100-python/, got .*nothing"
    ):
        data.load(tmp_path / "nothing")


def test_the_search_never_trains_on_what_it_judges_by():
    kept, held_out = data.search_split(50000)
    assert len(kept) == 45000
    assert len(held_out) == 5000
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(50000))


def test_methods_at_a_zero_guide_and_alone_give_kd_and_ce():
    torch.manual_seed(0)
    batch = Batch(
        torch.empty(0), torch.randint(100, (16,)), torch.randn(16, 100), torch.randn(16, 64), torch.arange(16)
    )
    logits = torch.randn(16, 100)
    ours = disk(ce_weight=0.3, temperature=2.0)
    torch.nn.init.zeros_(ours.disk.guide.mlp[-1].weight)
    torch.nn.init.constant_(ours.disk.guide.mlp[-1].bias, -80.0)
    torch.testing.assert_close(ours(logits, batch), KD(ce_weight=0.3, temperature=2.0)(logits, batch))
    torch.testing.assert_close(CE()(logits, batch), KD(ce_weight=1.0)(logits, batch))


def test_a_student_is_trained_by_its_own_method_alone(train, teacher):
    alone = run_of(train, teacher, {"kd": KD()}).fit()
    beside = run_of(train, teacher, {"ce": CE(), "kd": KD(), "disk": disk()}).fit()
    for key, value in alone.states()["kd"].items():
        torch.testing.assert_close(beside.states()["kd"][key], value, rtol=0.05, atol=0.05)
    assert alone.logs["kd"][0]["loss"] == pytest.approx(beside.logs["kd"][0]["loss"], rel=0.02)


@pytest.mark.parametrize("name", ["disk", "disk-alternating", "disk-replay"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, train, teacher, name):
    def made():
        return {"kd": KD(), name: disk(name)}

    whole = run_of(train, teacher, made()).fit()
    half = run_of(train, teacher, made(), tmp_path)
    while half.epoch < 2:  # as fit() does, stopped after two epochs
        half.fit_epoch()
    torch.manual_seed(99)
    again = run_of(train, teacher, made(), tmp_path)
    assert again.epoch == 2
    again.fit()
    assert again.logs == whole.logs
    for student, state in whole.states().items():
        assert all(torch.equal(value, again.states()[student][key]) for key, value in state.items())
    guide = zip(whole.methods[name].state_dict().items(), again.methods[name].state_dict().items(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in guide if isinstance(a, torch.Tensor))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from small_images import data
from small_images.methods import make_method
from small_images.resnet import ResNet
from small_images.training import Recipe, Run
from small_images.views import Views

torch.set_num_threads(1)  # as in the tests: sums in another number of parts round otherwise

def run(folder, die_at=None):
    train = data.synthetic(240)[0]
    torch.manual_seed(1)
    teacher = ResNet("resnet10-s").eval()
    method = make_method(
        "disk-replay", {"budget": 0.2, "multiplier": 50.0}, feature_dim=64, epochs=4, seed=0
    )
    calls, forward = [], method.forward
    def counted(*inputs):
        calls.append(None)
        if len(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*inputs)
    method.forward = counted
    recipe = Recipe("resnet10-xxs", 4, 3, batch_size=40, progress=False)
    views = Views(train, 2, teacher, None)
    made = Run(recipe, {"disk": method}, None, views, torch.arange(120), train, folder)
    begun = made.epoch
    return begun, made.fit()

if __name__ == "__main__":
    run(Path(sys.argv[1]), die_at=8)  # in the third of four epochs of three batches
"""


def test_a_killed_training_loses_its_unfinished_epoch_alone(tmp_path):
    script, folder = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    path = os.pathsep.join([str(RESULTS.parent), str(RESULTS.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    child = subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    again = {"__name__": "again"}
    exec(compile(KILLED, str(script), "exec"), again)
    begun, resumed = again["run"](folder)
    assert begun == 2
    _, whole = again["run"](None)
    assert resumed.logs == whole.logs
    assert all(torch.equal(value, resumed.states()["disk"][key]) for key, value in whole.states()["disk"].items())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, train, teacher):
    run_of(train, teacher, {"kd": KD()}, tmp_path, epochs=1).fit()
    with pytest.raises(RuntimeError, match=r"holds a run with other settings; expected .*'temperature': 2.0"):
        run_of(train, teacher, {"kd": KD(temperature=2.0)}, tmp_path, epochs=1)


def test_alternation_trains_the_guide_before_every_third_pass_of_the_student(train, teacher):
    method = disk("disk-alternating")
    run = run_of(train, teacher, {"disk": method})
    student = {key: value.clone() for key, value in run.states()["disk"].items()}
    guide = [parameter.clone() for parameter in method.parameters()]
    run._guide_passes()
    assert method.disk.statistics().positions == 0  # the log is of the student's passes
    assert all(torch.equal(value, run.states()["disk"][key]) for key, value in student.items())
    moved = [parameter.clone() for parameter in method.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(guide, moved, strict=True))
    run._student_pass()
    assert all(torch.equal(a, b) for a, b in zip(moved, method.parameters(), strict=True))
    run.epoch = 1
    run._guide_passes()
    assert all(torch.equal(a, b) for a, b in zip(moved, method.parameters(), strict=True))


def test_the_replay_trains_the_guide_between_the_students_passes_alone(train, teacher):
    method = disk("disk-replay")
    run, trained = run_of(train, teacher, {"disk": method}, epochs=4), []
    for _ in range(3):
        guide = [parameter.clone() for parameter in method.parameters()]
        run._student_pass()
        assert all(torch.equal(a, b) for a, b in zip(guide, method.parameters(), strict=True))
        student = {key: value.clone() for key, value in run.states()["disk"].items()}
        method.end_epoch()
        assert all(torch.equal(value, run.states()["disk"][key]) for key, value in student.items())
        trained.append(not any(torch.equal(a, b) for a, b in zip(guide, method.parameters(), strict=True)))
        assert len(method.replay) == 0
    assert trained == [True, False, True]
    assert method.dual.epoch == 1


def test_algorithm_1_moves_the_multiplier_once_per_outer_iteration(train, teacher):
    method = make_method(
        "disk-alternating",
        {"multiplier": (10.0, 50.0), "periods": 1},
        feature_dim=64,
        epochs=6,
        seed=0,
        budget=0.2,
    )
    run = run_of(train, teacher, {"disk": method}, epochs=6).fit()
    seen = [epoch["multiplier"] for epoch in run.logs["disk"]]
    assert seen == pytest.approx([10.0] * 3 + [30.0] * 3)
    assert method.disk.multiplier.item() == 50.0


@pytest.mark.parametrize("change", ["views", "start", "data", "teacher"])
def test_a_checkpoint_of_another_experiment_is_refused(tmp_path, train, teacher, change):
    def run(views, start=None, folder=tmp_path):
        recipe = Recipe("resnet10-xxs", 1, 3, batch_size=40, progress=False)
        return Run(recipe, {"kd": KD()}, start, views, torch.arange(120), train, folder)

    run(Views(train, 2, teacher, None)).fit()
    torch.manual_seed(2)
    other = ResNet("resnet10-s").eval()
    shifted = train._replace(labels=(train.labels + 1) % 100)
    views = {
        "views": Views(train, 3, teacher, None),
        "start": Views(train, 2, teacher, None),
        "data": Views(shifted.part(torch.arange(199)), 2, teacher, None),
        "teacher": Views(train, 2, other, None),
    }[change]
    start = ResNet("resnet10-xxs").state_dict() if change == "start" else None
    with pytest.raises(RuntimeError, match="holds a run with other settings"):
        run(views, start)


def test_labels_are_flipped_to_another_class():
    labels = torch.arange(1000) % 100
    noisy, flipped = data.flip(labels, 0.1)
    assert flipped.sum() == 100
    assert torch.equal(noisy != labels, flipped)
    assert noisy.min() >= 0
    assert noisy.max() < 100


def test_the_budget_on_the_discount_moves_the_guide_as_its_equation_says(train, teacher):
    method = disk("disk-discount-budget", temperature=2.0, multiplier=3.0, budget=0.01)
    batch = Batch(train.images[:16], torch.arange(16), torch.randn(16, 100), torch.randn(16, 64), torch.arange(16))
    logits = torch.randn(16, 100, requires_grad=True)
    method(logits, batch).backward()
    loss = method.disk
    guide = [parameter.grad.clone() for parameter in loss.guide.parameters()]
    student = logits.grad.clone()
    logits.grad = None
    loss.guide.zero_grad()
    terms = loss.terms(logits, batch.teacher_logits, batch.labels, batch.teacher_features)
    terms.student_loss.backward()
    torch.testing.assert_close(student, logits.grad)
    # by small steps of the guide's logits through the library's own divergence and discount
    arguments = (logits.detach().double(), batch.teacher_logits.double())
    guide_logits = loss.guide_logits(batch.teacher_logits, batch.teacher_features)

    def objective(guide_logits):
        scaffold = functional.scaffolded_kl(*arguments, guide_logits.double(), temperature=2.0, reduction="none")
        discount = functional.discount(*arguments, guide_logits.double(), temperature=2.0)
        assert discount.mean() > 0.01
        return 0.9 * scaffold + 3.0 * discount

    exact = guide_logits.detach().double()
    slope = (objective(exact + 1e-4) - objective(exact - 1e-4)) / 2e-4 / 16
    loss.guide.zero_grad()
    guide_logits.backward(slope.float())
    for found, parameter in zip(guide, loss.guide.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=2e-3, atol=1e-5)


def test_what_is_repeated_came_within_a_point_of_the_best():
    rows = {
        "kd 0": {"method": "kd", "accuracy": 20.0, "settings": {}},
        "kd 1": {"method": "kd", "accuracy": 25.0, "settings": {"temperature": 2.0}},
        "disk 0": {"method": "disk", "accuracy": 22.0, "settings": {}},
        "disk 1": {"method": "disk", "accuracy": 23.0, "settings": {"top_k": 5}},
        "other": {"method": "disk", "accuracy": 21.5, "settings": {}},
        "alternating": {"method": "disk-alternating", "accuracy": 20.0, "settings": {}},
    }
    assert screening.close_to_best(rows) == {
        "kd 1": ("kd", {"temperature": 2.0}),
        "disk 0": ("disk", {}),
        "disk 1": ("disk", {"top_k": 5}),
        "alternating": ("disk-alternating", {}),
    }


@pytest.mark.filterwarnings("ignore:the guide is dead")
@pytest.mark.filterwarnings("ignore:in a schedule of epochs=1")
def test_screen_repeat_and_regimes_run_as_typed(monkeypatch, tmp_path, capsys):
    """On random images: the search's and the screen's files of one call are what the next one reads."""
    monkeypatch.setattr(cifar100, "RESULTS", tmp_path)
    monkeypatch.setattr(data, "load", lambda path: data.synthetic())
    monkeypatch.setattr(data, "HELD_OUT", 200)
    monkeypatch.setattr(trials, "KD_TRIALS", trials.KD_TRIALS[:1])
    monkeypatch.setattr(trials, "DISK_TRIALS", trials.DISK_TRIALS[:1])
    monkeypatch.setattr(trials, "SCREEN", {"alternating": trials.SCREEN["alternating"]})
    regimes = {"few": trials.Regime(images=100, wrong_labels=0.5, epochs=2, warm_epochs=1)}
    monkeypatch.setattr(trials, "REGIMES", regimes | {"scratch": trials.Regime(epochs=1, warm_epochs=0)})
    shared = ["--data", "x.npz", "--out", str(tmp_path), "--teacher", "resnet10-s", "--views", "2", "--seeds", "2"]
    shared += ["--teacher-epochs", "1", "--warm-epochs", "1", "--search-epochs", "2", "--no-compile"]
    for flag in ("--search", "--screen", "--repeat", "--regimes"):
        monkeypatch.setattr(sys, "argv", ["cifar100.py", flag, *shared, "--methods", "kd", "disk", "--device", "cpu"])
        cifar100.main()
    found = {
        name: json.loads((tmp_path / f"cifar100_10-s_10-xxs_{name}.json").read_text())
        for name in ("screen", "repeat", "regimes")
    }
    assert len(found["screen"]["rows"]["alternating"]["log"]) == 2
    assert found["repeat"]["protocol"]["seed"] == [101, 102]
    assert found["repeat"]["protocol"]["trials"] == {"kd": 1, "disk": 1, "disk-alternating": 1}
    assert found["repeat"]["methods"]["alternating"]["passes"] == {"student": 2, "extra_forwards": 2}
    assert all(len(row["last_epoch"]) == 2 for row in found["repeat"]["methods"].values())
    assert found["repeat"]["methods"].keys() >= {"kd"}
    assert {name: list(row["logs"]) for name, row in found["regimes"]["regimes"].items()} == {
        "few": ["kd", "disk"],
        "scratch": ["kd", "disk"],
    }
    assert report.regimes_table(found["regimes"]) in capsys.readouterr().out


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of .*got 'dkd'"):
        make_method("dkd", {})


class Scaled(KD):
    """Another method, as a user would add it: a class and a line."""

    def forward(self, student_logits, batch):
        return 2 * super().forward(student_logits, batch)


@pytest.mark.filterwarnings("ignore:the guide is dead")
def test_another_method_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "scaled", Scaled)
    monkeypatch.setattr(trials, "KD_TRIALS", trials.KD_TRIALS[:1])
    monkeypatch.setattr(trials, "DISK_TRIALS", trials.DISK_TRIALS[:1])
    monkeypatch.setattr(sys, "argv", ["cifar100.py", "--dry-run", "--methods", "scaled", "--out", str(tmp_path)])
    cifar100.main()
    results = json.loads((tmp_path / "cifar100_10-s_10-xxs_3.json").read_text())
    assert len(results["methods"]["scaled"]["last_epoch"]) == 2


def test_kd_and_disk_are_searched_with_the_same_number_of_trials():
    assert len(trials.KD_TRIALS) == len(trials.DISK_TRIALS)
    search = json.loads((RESULTS / "cifar100_10-l_10-xxs_search.json").read_text())
    assert search["trials"] == {"kd": len(trials.KD_TRIALS), "disk": len(trials.DISK_TRIALS)}
    for method in ("kd", "disk"):
        rows = [row for name, row in search["rows"].items() if name.startswith(f"{method} ")]
        assert search["chosen"][method]["accuracy"] == max(row["log"][-1]["accuracy"] for row in rows)


@pytest.mark.parametrize(
    ("name", "table", "page", "marker"),
    [
        ("cifar100_10-l_10-xxs_30", report.table, "cifar100.md", "cifar100"),
        ("cifar100_10-l_10-xxs_search", report.search_table, "cifar100_settings.md", "search"),
        ("cifar100_10-l_10-xxs_screen", report.search_table, "cifar100_settings.md", "screen"),
        ("cifar100_10-l_10-xxs_repeat", report.compared_table, "cifar100_settings.md", "repeat"),
        ("cifar100_10-l_10-xxs_regimes", report.regimes_table, "cifar100.md", "regimes"),
        ("cifar100_10-l_10-xxs_seconds", report.seconds_table, "cifar100.md", "seconds"),
        ("label_noise", label_noise.table, "wrong_labels.md", "label-noise"),
        ("cifar100_10-l_10-xxs_cifd_search", report.search_table, "cifd.md", "cifd-search"),
        ("cifar100_10-l_10-xxs_cifd_search", lambda found: found["modules_table"], "cifd.md", "cifd-modules"),
        ("cifar100_10-l_10-xxs_12", report.table, "cifd.md", "cifd"),
        ("cifar100_swin_10-xxs_search", report.search_table, "scalekd.md", "scalekd-kd-search"),
        ("cifar100_swin_10-xxs_scalekd_search", report.search_table, "scalekd.md", "scalekd-search"),
        ("cifar100_swin_10-xxs_4", report.table, "scalekd.md", "scalekd"),
        ("cifar100_10-l_10-xxs_conditions", conditions_table, "few_features.md", "conditions"),
    ],
)
def test_pages_repeat_the_committed_values(name, table, page, marker):
    assert shown(page, marker) == table(json.loads((RESULTS / f"{name}.json").read_text()))


RIVALS = ("uniform-1", "uniform-2", "disk-1")  # of KD, where three settings each are compared


def test_what_the_page_says_of_few_features_is_committed():
    found = json.loads((RESULTS / "cifar100_10-l_10-xxs_conditions.json").read_text())["conditions"]
    page = (PAGES / "few_features.md").read_text()
    forms = ("uniform-1", "uniform-2", "disk-1", "disk-2")
    gaps, values = [], {}
    for name in ("8 features, KD searched", "as it is, KD searched"):
        kd = found[name]["kd"]
        values[name] = [found[name]["differences"][f"{form} - {kd}"] for form in forms]
        for cell in found[name]["cells"]:
            own = cell["methods"][kd]
            gaps.append((cell["teacher"]["train"] - own["train"], abs(own["train"] - own["held_out"])))
    ahead = [value for row in values["8 features, KD searched"] for value in row["values"]]
    assert (len(ahead), round(min(ahead), 2), round(max(ahead), 2)) == (20, 0.06, 1.34)
    added = [value for row in values["8 features, KD searched"] for value in row["values"][3:]]
    assert (len(added), round(min(added), 2), round(max(added), 2)) == (8, 0.06, 1.34)
    assert all(low < 0 < high for low, high in (row["interval_95"] for row in values["as it is, KD searched"]))
    assert round(values["as it is, KD searched"][0]["values"][0], 2) == 1.36
    kd = found["4 features"]["kd"]
    forms = [found["4 features"]["differences"][f"{form} - {kd}"] for form in RIVALS]
    ahead = [value for row in forms for value in row["values"]]
    assert f"by {min(ahead):.2f} to {max(ahead):.2f} points" in line_of(page, "- **4 features**")
    one_g, _, guided = (row["values"] for row in forms)
    apart = [a - b for a, b in zip(guided, one_g, strict=True)]
    count, mean = sum(value > 0 for value in apart), sum(apart) / len(apart)
    assert f"ahead of it on {count} of {len(apart)} seeds, by {mean:.2f} points" in line_of(page, "- **The scaffold")
    said = {
        "with 20 superclasses": "20 superclasses",
        "with a fifth": "a fifth of the images",
        "with a teacher whose errors": "a teacher that is always right",
        "with a weaker teacher": "a weaker teacher",
    }
    for words, name in said.items():
        rows = [found[name]["differences"][f"{form} - {found[name]['kd']}"]["values"] for form in RIVALS]
        low, high = min(map(min, rows)), max(map(max, rows))
        assert re.search(rf"{re.escape(f'{low:+.2f} to {high:+.2f}')} (points )?{words}", line_of(page, "- **With 16"))
    assert width_of("resnet10-xxs") == ENOUGH_FEATURES
    limited = {}  # the gaps by capacity and by data where the thresholds alone would recommend DiSK
    for name in ("as it is, KD searched", *said.values()):
        own = [(cell["teacher"]["train"], cell["methods"][found[name]["kd"]]) for cell in found[name]["cells"]]
        pairs = [(teacher - kd["train"], kd["train"] - kd["held_out"]) for teacher, kd in own]
        if all(gap >= SMALLEST_CAPACITY_GAP and rest <= LARGEST_DATA_GAP for gap, rest in pairs):
            limited[name] = pairs
    assert {"as it is, KD searched", *said.values()} - {*limited} == {"a weaker teacher"}
    by_capacity, by_data = zip(*(pair for pairs in limited.values() for pair in pairs), strict=True)
    numbers = (
        f"by capacity of {min(by_capacity):.1f} to {max(by_capacity):.1f} points, by data of at most {max(by_data):.1f}"
    )
    assert numbers in line_of(page, "- **`capacity_gap` therefore")
    replayed = found["8 features, Algorithm 1"]
    for form in ("paper-4", "paper-2", "zeroed-replay-2"):
        values = sorted(abs(value) for value in replayed["differences"][f"{form} - {replayed['kd']}"]["values"])
        assert "{:.2f} and {:.2f}".format(*values) in line_of(page, "- **Algorithm 1**")
    wider = found["as it is, Algorithm 1"]
    behind = [wider["differences"][f"{form} - {wider['kd']}"]["values"] for form in ("paper-4", "paper-2")]
    assert max(map(max, behind)) < -6
    zeroed = wider["differences"][f"zeroed-replay-2 - {wider['kd']}"]["values"]
    assert "at {:+.2f} and {:+.2f}".format(*zeroed) in line_of(page, "- **Algorithm 1**")
    for name in ("4 features", "4 features, cooler KD"):
        for cell in found[name]["cells"]:
            own = cell["methods"][found[name]["kd"]]
            gaps.append((cell["teacher"]["train"] - own["train"], abs(own["train"] - own["held_out"])))
    cooler = [cell["methods"] for cell in found["4 features, cooler KD"]["cells"]]
    best = [max(each["held_out"] for name, each in cell.items() if name.startswith("kd")) for cell in cooler]
    margins = [cell["disk-1"]["held_out"] - kd for cell, kd in zip(cooler, best, strict=True)]
    assert "{:.2f} and {:.2f} points ahead".format(*margins) in line_of(page, "- **Cooler KD")
    pairs = [*zip(cooler, (cell["methods"] for cell in found["4 features"]["cells"]), strict=False)]
    apart = max(abs(a[name]["held_out"] - b[name]["held_out"]) for a, b in pairs for name in ("kd-1", "disk-1"))
    assert f"ends up to {apart:.2f} points elsewhere" in line_of(page, "- **Cooler KD")
    capacity_gaps, data_gaps = zip(*gaps, strict=True)
    assert min(capacity_gaps) > 39
    assert max(data_gaps) < 1.31


def line_of(page, start):
    """Return the page's line that begins so."""
    [line] = [line for line in page.splitlines() if line.startswith(start)]
    return line


def test_the_report_used_the_frozen_settings_and_equal_passes():
    results = json.loads((RESULTS / "cifar100_10-l_10-xxs_30.json").read_text())
    search = json.loads((RESULTS / "cifar100_10-l_10-xxs_search.json").read_text())
    assert results["protocol"]["settings"] == search["chosen"]
    assert all(len(row["last_epoch"]) == results["protocol"]["seeds"] for row in results["methods"].values())
    passes = {name: row["passes"]["student"] for name, row in results["methods"].items()}
    passes.pop("kd, 1/3 of the passes", None)
    assert set(passes.values()) == {30}
    for name, row in results["methods"].items():
        assert row["last_epoch"] == [run[-1]["accuracy"] for run in results["logs"][name]]


def test_the_preset_is_what_the_search_chose():
    search = json.loads((RESULTS / "cifar100_10-l_10-xxs_search.json").read_text())
    preset = {**presets.CIFAR100_SEARCHED["loss"]}
    assert preset.pop("distill_weight") == 1 - preset["ce_weight"]
    assert preset == search["chosen"]["disk"]["settings"]
    largest = preset["multiplier"]
    assert presets.CIFAR100_SEARCHED["dual"]["multiplier"] == (largest, largest)


def test_differences_are_paired_with_a_t_interval():
    def runs(*last):
        return {seed: [{"accuracy": 0.0}, {"accuracy": value}] for seed, value in enumerate(last)}

    found = report.differences({"kd": runs(10.0, 12.0, 14.0), "disk": runs(11.0, 12.5, 15.5)}, "kd")["disk - kd"]
    assert found["mean"] == pytest.approx(1.0)
    assert found["interval_95"] == pytest.approx([1 - 4.302653 * 0.5 / 3**0.5, 1 + 4.302653 * 0.5 / 3**0.5])


# two epochs end before the default schedule has raised its multiplier
@pytest.mark.filterwarnings("ignore:the guide is dead")
def test_a_dry_run_writes_table_curves_and_values(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cifar100.py", "--dry-run", "--methods", "kd", "disk", "--out", str(tmp_path)])
    monkeypatch.setattr(trials, "KD_TRIALS", trials.KD_TRIALS[:1])
    monkeypatch.setattr(trials, "DISK_TRIALS", trials.DISK_TRIALS[:1])
    cifar100.main()
    results = json.loads((tmp_path / "cifar100_10-s_10-xxs_3.json").read_text())
    assert report.table(results) in capsys.readouterr().out
    assert results["methods"]["kd"]["passes"] == {"student": 3, "extra_forwards": 0}
    assert results["methods"]["kd, 1/3 of the passes"]["passes"]["student"] == 1
    with (tmp_path / "cifar100_10-s_10-xxs_3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 3 + 1)  # seeds times epochs
    assert (tmp_path / "cifar100_10-s_10-xxs_3.png").stat().st_size > 10_000
