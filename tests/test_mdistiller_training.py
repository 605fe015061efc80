"""Training in mdistiller: what batches a seed gives, at which rates, what a kill leaves, which files serve as what."""

import hashlib
import os
import pickle
import random
import re
import runpy
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_mdistiller as shared
import torch
from test_mdistiller import MOVING, assert_same, gathered, image_batch, launch, load, refused
from torch import nn

from disk_plugin import features

host = shared.host
pytestmark = shared.pytestmark

ALTERNATING = ["SOLVER.TRAINER", "disk", "DISK.ALTERNATING.GUIDE_PASSES", "2", "DISK.ALTERNATING.STUDENT_PASSES", "2"]
REPLAY = [*ALTERNATING, "DISK.ALTERNATING.REPLAY", "True"]
SCALEKD = ["SCALEKD", "DISK_SCALEKD"]  # for models with two stages


# seeds


@pytest.fixture
def batches(monkeypatch):
    """Hashes of what the student trains on, by epoch, and of what the guide's passes show it."""
    seen = SimpleNamespace(student={}, guide={}, loaders=[])
    seen.keep = lambda loader: seen.loaders.append(loader) or loader
    forward = nn.DataParallel.forward

    def watched(self, *inputs, **kwargs):
        if "target" in kwargs:
            kind = seen.student if torch.is_grad_enabled() else seen.guide
            content = kwargs["image"].numpy().tobytes() + kwargs["target"].numpy().tobytes()
            kind.setdefault(kwargs["epoch"], []).append(hashlib.sha256(content).hexdigest()[:16])
        return forward(self, *inputs, **kwargs)

    monkeypatch.setattr(nn.DataParallel, "forward", watched)
    return seen


def batches_of(seen, host, *words, **settings):
    seen.student.clear()
    seen.guide.clear()
    launch(host, *words, **settings)
    for loader in seen.loaders:  # left to the garbage collection, each costs seconds
        loader._iterator = None
    return dict(seen.student)


def test_no_epoch_of_one_seed_shows_the_batches_of_another_seeds_epoch(host, batches):
    runs = [batches_of(batches, host, seed=seed, out=f"out{seed}", epochs=3) for seed in (0, 1, 2)]
    shown = [batch for run in runs for epoch in run.values() for batch in epoch]
    assert len(set(shown)) == len(shown) == 3 * 3 * 3


def test_seeds_and_epochs_are_mixed_and_any_integer_is_a_seed(host):
    shared.registered(host)
    from disk_plugin.integrations.mdistiller.seeds import seed_everything

    def draws(*key):
        seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    seeds = [-1, 0, 1, 2, 5, 2**31, 2**32, 2**32 + 5]
    drawn = {(seed, epoch): draws(seed, epoch) for seed in seeds for epoch in range(241)}
    for generator in zip(*drawn.values(), strict=True):
        assert len(set(generator)) > 0.999 * len(drawn)
    assert len(set(drawn.values())) == len(drawn)
    assert draws(1) == drawn[1, 0]  # the initial weights' numbers are no epoch's
    assert draws(5, 240) == drawn[5, 240]


def persistent(loader, *arguments, num_workers=0, **settings):
    return loader(*arguments, num_workers=num_workers, persistent_workers=num_workers > 0, **settings)


@pytest.mark.parametrize("loader", ["no workers", "workers", "persistent workers"])
def test_under_one_seed_every_method_sees_the_same_batches_in_every_epoch_also_after_resuming(
    host, batches, monkeypatch, loader
):
    if loader == "persistent workers":  # as a fork's loader may have them
        plain = torch.utils.data.DataLoader
        monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *a, **k: batches.keep(persistent(plain, *a, **k)))
    words = ["DATASET.NUM_WORKERS", "0" if loader == "no workers" else "1"]
    expected = batches_of(batches, host, *words, distiller="KD", out="kd", epochs=3)
    assert sorted(expected) == [1, 2, 3]
    for number, (distiller, extra) in enumerate(
        [("DISK", []), ("DISK", ALTERNATING), ("DISK", REPLAY), ("DISK_SIMKD", ALTERNATING)]
    ):
        settings = {"distiller": distiller, "out": f"out{number}"}
        assert batches_of(batches, host, *words, *extra, **settings, epochs=2) == {e: expected[e] for e in (1, 2)}
        if extra:  # other orders and views for the guide, in each of its passes
            guided = [*batches.guide[1], *expected[1]]
            assert len(set(guided)) == len(guided) == 3 * 3
        assert batches_of(batches, host, *words, *extra, "--resume", **settings, epochs=3) == {3: expected[3]}


def test_random_numbers_are_put_back_after_guide_passes_and_theirs_differ(host):
    shared.registered(host)
    from disk_plugin.integrations.mdistiller.seeds import apart

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = draw()
    inside = []
    for number in (1, 2):
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        with apart(number):
            inside.append(draw())
        assert draw() == expected
    for column in zip(expected, *inside, strict=True):
        assert len(set(column)) == 3


# rates of the guide's passes


def rates_of(host, words, *, epochs, first=1):
    """Return the steps of an own trainer, one a pass: whose, and at which rate."""
    words = ["SOLVER.TRAINER", "disk", "SOLVER.EPOCHS", epochs, "SOLVER.LR", 0.1, "DISK.ALTERNATING.LR", 0.1, *words]
    words += ["SOLVER.LR_DECAY_STAGES", [3], "DISK.ALTERNATING.GUIDE_PASSES", 3, "DISK.ALTERNATING.STUDENT_PASSES", 3]
    modules, cfg, distiller = shared.distiller_of(host, "DISK", *words)
    image, target = image_batch()
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    wrapped, batch = nn.DataParallel(distiller), [(image, target, torch.arange(8))]
    trainer = modules.engine.trainer_dict["disk"]("own", wrapped, batch, [(image, target)], cfg)
    events, step, train_iter = [], trainer.guide_optimizer.step, trainer.train_iter

    def guide_step():
        events.append(("guide", trainer.guide_optimizer.param_groups[0]["lr"]))
        return step()

    def student_step(data, epoch, meters):
        events.append(("student", trainer.optimizer.param_groups[0]["lr"]))
        return train_iter(data, epoch, meters)

    trainer.guide_optimizer.step, trainer.train_iter = guide_step, student_step
    trainer.train(resume=first > 1)
    return [(kind, round(rate, 6)) for kind, rate in events]


def table(*groups):
    return [(kind, rate) for kind, rate, count in groups for _ in range(count)]


LITERAL_RATES = table(("guide", 0.1, 3), ("student", 0.1, 3), ("guide", 0.01, 3), ("student", 0.01, 3))


@pytest.mark.parametrize("replay", [False, True])
def test_guide_passes_run_at_the_rate_of_the_epochs_they_precede_recorded_or_not(host, replay):
    assert rates_of(host, ["DISK.ALTERNATING.REPLAY", replay], epochs=6) == LITERAL_RATES


def test_a_replayed_run_that_goes_on_makes_the_guide_passes_that_its_last_epoch_left(host):
    words = ["DISK.ALTERNATING.REPLAY", True]
    assert rates_of(host, words, epochs=3) == LITERAL_RATES[:6]
    assert rates_of(host, words, epochs=6, first=4) == LITERAL_RATES[6:]


# kills


class Killed(BaseException):
    """What no handler of an Exception sees."""


@pytest.fixture
def writes(monkeypatch):
    """Kill a run before its n-th write: while a file is on its way to the disk, or before it is in its place."""
    killer = SimpleNamespace(at=None, count=0, last=None)

    def counted(name, function):
        def wrapper(*arguments):
            main = threading.current_thread() is threading.main_thread()  # not one that logs
            if main and (name, name) != (killer.last, "fsync"):  # of files that are written in a row, the first
                if killer.at == killer.count:
                    killer.at = None
                    raise Killed
                killer.count += 1
            killer.last = name if main else killer.last
            return function(*arguments)

        return wrapper

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return killer


def kills_in_the_second_epoch(host, writes, words, **settings):
    """Yield the folder of a run that was killed at each of its writes in turn."""
    counts = []
    for epochs in (1, 2):
        writes.count = 0
        launch(host, *words, out=f"count{epochs}", epochs=epochs, **settings)
        counts.append(writes.count)
    assert counts[1] >= counts[0] + 5
    for at in range(*counts):
        writes.at, writes.count = at, 0
        with pytest.raises(Killed):
            launch(host, *words, out=f"killed{at}", epochs=3, **settings)
        yield f"killed{at}"


def epochs_logged(folder):
    lines = (folder / "worklog.txt").read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("epoch: ")]


@pytest.mark.parametrize(("distiller", "words"), [("KD", []), ("DISK_SIMKD", MOVING), ("DISK", REPLAY)])
def test_wherever_a_seeded_run_is_killed_and_resumed_it_leaves_the_files_of_an_uninterrupted_one(
    host, writes, distiller, words
):
    words = ["LOG.SAVE_CHECKPOINT_FREQ", "2", *words]
    whole = launch(host, *words, distiller=distiller, out="whole", epochs=3)
    names = [path.name for path in whole.iterdir() if path.name.endswith(("latest", "best", "_2"))]
    assert {"latest", "student_latest", "best", "student_best"} <= set(names)
    assert ("simkd_best" in names) == (distiller == "DISK_SIMKD")
    for out in kills_in_the_second_epoch(host, writes, words, distiller=distiller):
        folder = launch(host, *words, "--resume", distiller=distiller, out=out, epochs=3)
        for name in names:
            assert_same(load(folder / name), load(whole / name), f"{out}: {name}")
        assert (folder / "worklog.txt").read_text() == (whole / "worklog.txt").read_text(), out
        assert epochs_logged(folder) == [1, 2, 3]
        assert not list(folder.glob("*.partial"))


def test_after_any_kill_best_is_the_model_whose_accuracy_best_acc_names_though_the_rerun_differs(
    host, writes, monkeypatch
):
    run_path, accuracies = runpy.run_path, {1: 10.0, 2: 60.0, 3: 30.0}

    def with_accuracies(path, **settings):
        trainer = sys.modules["mdistiller.engine.trainer"]
        epochs = []
        monkeypatch.setattr(
            sys.modules["disk_plugin.integrations.mdistiller.trainers"].CompleteTrainer,
            "before_epoch",
            lambda self, epoch: epochs.append(epoch),
        )
        trainer.validate = lambda *_: (torch.tensor(accuracies[epochs[-1]]), torch.tensor(90.0), 1.0)
        return run_path(path, **settings)

    monkeypatch.setattr(runpy, "run_path", with_accuracies)
    for out in kills_in_the_second_epoch(host, writes, [], distiller="KD", seed=None):
        accuracies[2] = 20.0  # of the second epoch if it has to be made again
        folder = launch(host, "--resume", distiller="KD", seed=None, out=out, epochs=3)
        accuracies[2] = 60.0
        latest, best = load(folder / "latest"), load(folder / "best")
        assert epochs_logged(folder) == [1, 2, 3]
        worklog = (folder / "worklog.txt").read_text()
        expected = (2, 60.0) if "test_acc: 60.00" in worklog else (3, 30.0)
        assert (best["epoch"], best["best_acc"].item()) == expected, out
        assert latest["best_acc"].item() == expected[1]
        student = {f"module.student.{name}": value for name, value in load(folder / "student_best")["model"].items()}
        assert_same(student, {name: best["model"][name] for name in student})


# which files serve as what


@pytest.mark.parametrize("distiller", ["SIMKD", "DISK_SIMKD"])
def test_a_student_without_a_trained_classifier_is_refused_wherever_one_is_needed(host, distiller):
    folder = launch(host, distiller=distiller, epochs=1)
    plain = launch(host, distiller="KD", out="kd", epochs=1)
    assert load(folder / "student_best").keys() - load(plain / "student_best").keys() == {"untrained_head"}
    for name in ("student_best", "student_latest", "best", "latest", "simkd_best"):
        copy = shutil.copy(folder / name, host.folder / f"copy_of_{name}")
        for words, settings in (
            (["--teacher-checkpoint", str(copy)], {"teacher": host.student}),
            (["DISTILLER.WARM_START", str(copy)], {"distiller": "KD"}),
            (["DISTILLER.WARM_START", str(copy)], {}),
            *([] if name == "simkd_best" else [(["--evaluate", str(copy)], {})]),
        ):
            message = refused(host, *words, **settings)
            assert f"{words[0]} needs a network with a trained classifier" in message
            assert "a student trained by SimKD" in message
    launch(host, "--evaluate", str(host.folder / "copy_of_simkd_best"))


@pytest.mark.parametrize("distiller", ["SIMKD", "DISK_SIMKD"])
@pytest.mark.parametrize("name", ["student_best", "latest", "simkd_latest"])
def test_simkd_may_start_from_simkds_student_whose_classifier_it_does_not_read(host, distiller, name):
    first = launch(host, distiller="SIMKD", out="first", epochs=1)
    words = ["DISTILLER.WARM_START", str(first / name), "SOLVER.LR", "1e-12"]
    folder = launch(host, *words, distiller=distiller, out="second", epochs=1)
    weights, begun = (load(place / "student_latest")["model"] for place in (first, folder))
    for key, value in weights.items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(begun[key], value, rtol=0, atol=1e-6)


def test_a_simkd_students_file_from_before_the_mark_is_refused_in_its_folder(host):
    folder = launch(host, distiller="SIMKD", epochs=1)
    torch.save({"model": load(folder / "student_best")["model"]}, folder / "student_best")
    path = str(folder / "student_best")
    assert "trained classifier" in refused(host, "DISTILLER.WARM_START", path, distiller="KD")
    assert "trained classifier" in refused(host, "--teacher-checkpoint", path, teacher=host.student)


@pytest.mark.parametrize("distiller", ["DISK", "KD"])
def test_a_whole_run_as_teacher_is_refused_naming_the_students_file_which_serves(host, distiller):
    folder = launch(host, distiller=distiller, epochs=1)
    for name in ("latest", "best"):
        message = refused(host, "--teacher-checkpoint", str(folder / name), teacher=host.student)
        assert f"got a whole run with its teacher and its student in {folder / name}" in message
        assert "student_best" in message
    student = str(folder / "student_best")
    launch(host, "--teacher-checkpoint", student, teacher=host.student, out="next", epochs=1)


def test_a_whole_run_without_a_teacher_serves_as_one(host):
    student = load(launch(host, distiller="KD", epochs=1) / "student_best")["model"]
    path = host.folder / "best_of_none"
    whole = {"epoch": 1, "model": {f"module.student.{name}": value for name, value in student.items()}, "best_acc": 1.0}
    torch.save(whole, path)
    taught = launch(host, "--teacher-checkpoint", str(path), teacher=host.student, out="next", epochs=1)
    state = load(taught / "latest")["model"]
    assert all(torch.equal(state[f"module.teacher.{name}"], value) for name, value in student.items())


# what is logged and told


def with_labels(host, labels):
    """Give the training images these labels; a network may be right by always saying the same."""
    path = host.folder / "data" / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), "fine_labels": labels}))


def constant(host, name, label):
    """Write a checkpoint of a model that sees one class in every image."""
    model = shared.registered(host).models.cifar_model_dict[name][0](num_classes=100)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        linear.bias.zero_()[label] = 100.0
    path = host.folder / f"{name}_{label}.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


METHODS = [("DISK", []), ("DISK", ALTERNATING), ("DISK", REPLAY), ("DISK_SIMKD", []), ("SIMKD", []), ("KD", [])]


@pytest.mark.parametrize("words", [[], ALTERNATING, REPLAY], ids=["joint", "alternating", "replay"])
@pytest.mark.parametrize(
    "distiller", [*("DISK", "DISK_SIMKD", "DISK_DKD", "DISK_CIFD", "DISK_HINTS", "HINTS", "CIFD"), *SCALEKD]
)
@pytest.mark.filterwarnings("ignore:the guide is dead")
@pytest.mark.filterwarnings("ignore:the module with R|the bottleneck.s noise")  # of a tiny pair
def test_a_resumed_run_of_every_method_equals_an_uninterrupted_one(host, distiller, words, docs_methods):
    if not distiller.startswith("DISK") and words:
        pytest.skip("Algorithm 1 needs a guide")
    words = [*words, *docs_methods, "DISK.DUAL.EPOCHS", "2" if words else "4"]  # a schedule of four epochs in all runs
    teacher, student = host.staged if distiller in SCALEKD else (host.teacher, host.student)
    words += ["DISTILLER.STUDENT", student]
    how = {"distiller": distiller, "teacher": teacher}
    whole = load(launch(host, *words, **how, out="whole", epochs=4) / "latest")
    launch(host, *words, **how, out="half", epochs=2)
    half = load(launch(host, *words, "--resume", **how, out="half", epochs=4) / "latest")
    assert_same(half["model"], whole["model"])
    assert whole["model"].keys() == half["model"].keys()
    assert ("module.hints.regressor.weight" in whole["model"]) == distiller.endswith("HINTS")
    first = load(launch(host, *words, **how, out="first", epochs=1) / "latest")
    own = ["scalekd.features."] if distiller in SCALEKD else []
    for part in ("student.", *own, *(["disk.guide."] if distiller.startswith("DISK") else [])):
        moved = [not torch.equal(value, first["model"][name]) for name, value in whole["model"].items() if part in name]
        assert any(moved), part


@pytest.mark.parametrize("distiller", SCALEKD)
def test_scalekd_tells_its_parameters_and_leaves_a_student_that_any_network_of_its_kind_loads(host, capfd, distiller):
    teacher, student = host.staged
    words = ["DISTILLER.STUDENT", student]
    folder = launch(host, *words, distiller=distiller, teacher=teacher, epochs=1)
    (count,) = re.findall(rf"note: {distiller} trains ([\d,]+) parameters of its own beside", capfd.readouterr().out)
    whole = load(folder / "latest")["model"]
    projectors = {name: value for name, value in whole.items() if name.startswith("module.scalekd.")}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    trained = [value.numel() for name, value in projectors.items() if not name.endswith(buffers)]
    assert int(count.replace(",", "")) == sum(trained)
    assert not any("tail" in name for name in projectors)
    weights = load(folder / "student_best")["model"]
    model = shared.registered(host).models.cifar_model_dict[student][0](num_classes=100)
    model.load_state_dict(weights)
    launch(host, *words, "--evaluate", str(folder / "student_best"), distiller=distiller, teacher=teacher)


def test_scalekd_is_refused_in_one_line_before_a_folder_is_made(host):
    teacher, student = host.staged
    name = "SCALEKD"
    for words, message in (
        (["SCALEKD.PROXY_HEADS", "7"], "error: proxy_heads must divide the teacher's width"),
        (["SCALEKD.NORM", "group"], "error: norm must be one of"),
    ):
        found = refused(host, "DISTILLER.STUDENT", student, *words, distiller=name, teacher=teacher)
        assert found.startswith(message)
        assert "\n" not in found
    found = refused(host, "DISTILLER.STUDENT", student, distiller=name, teacher=host.unusable)
    assert re.match(r"error: no tail found in \w+: .*A tail works for timm's Swin.*\(teacher \w+, student", found)
    assert not (host.folder / "out").exists()


def test_a_cross_entropy_beside_a_method_is_the_mean_over_labels_that_count(host):
    shared.registered(host)
    from disk_plugin.integrations.mdistiller.method_distiller import ce_loss

    logits, target = torch.randn(6, 5), torch.tensor([0, 1, -100, 2, -100, 4])
    (loss,) = ce_loss(logits, target, 0.5).values()
    assert loss.shape == (6,)
    torch.testing.assert_close(loss.mean(), 0.5 * nn.functional.cross_entropy(logits, target))
    assert ce_loss(logits, target, 0.0) == {}


@pytest.fixture
def docs_methods(tmp_path, monkeypatch):
    """Words that import the method of docs/write_a_method.md."""
    page = (Path(__file__).parents[1] / "docs" / "write_a_method.md").read_text()
    (source,) = re.findall(r"```python\n# my_methods\.py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_methods.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    yield ["--import", "my_methods"]
    features.METHODS.pop("hints", None)
    sys.modules.pop("my_methods", None)


def told(recwarn):
    return [str(warning.message) for warning in recwarn if "the teacher is right" in str(warning.message)]


@pytest.mark.parametrize(("distiller", "words"), METHODS)
def test_the_teachers_accuracy_is_logged_and_a_good_teacher_is_no_news(host, recwarn, capfd, distiller, words):
    with_labels(host, [7] * 18 + [8] * 6)
    teacher = ["--teacher-checkpoint", constant(host, host.teacher, 7), "SOLVER.LR", "1e-6"]
    folder = launch(host, *teacher, *words, distiller=distiller)
    assert (folder / "worklog.txt").read_text().count("\nteacher_acc: 75.00\n") == 2
    assert "| teacher_acc:75.00" in "".join(capfd.readouterr())
    assert told(recwarn) == []


@pytest.mark.parametrize(("distiller", "words"), METHODS)
def test_a_teacher_whose_classes_are_in_reverse_order_is_told_once_in_the_first_epoch(host, recwarn, distiller, words):
    with_labels(host, [7] * 18 + [8] * 6)
    words = ["--teacher-checkpoint", constant(host, host.teacher, 99 - 7), "SOLVER.LR", "1e-6", *words]
    launch(host, *words, distiller=distiller)
    samples = 48 if "disk" in words else 24  # of two guide passes, before the first of the student's
    (message,) = told(recwarn)
    assert f"right on 0.0% of the {samples} training samples of this epoch" in message
    assert "which cannot be told from chance for 100 classes" in message
    launch(host, *words, "--resume", distiller=distiller, epochs=3)
    assert told(recwarn) == [message]


@pytest.mark.parametrize(("distiller", "words"), [("DISK", []), ("KD", [])])
def test_a_teacher_behind_its_student_is_told(host, recwarn, distiller, words):
    with_labels(host, [7] * 18 + [8] * 6)
    words = ["--teacher-checkpoint", constant(host, host.teacher, 8), "SOLVER.LR", "1e-6"]
    words += ["DISTILLER.WARM_START", constant(host, host.student, 7)]
    launch(host, *words, distiller=distiller)
    (message,) = told(recwarn)
    assert "right on 25.0% of the 24 training samples of this epoch, the student on 75.0%" in message


def test_the_teacher_is_watched_on_every_replica(host):
    modules, cfg, distiller = shared.distiller_of(host, "SIMKD")
    image, _ = image_batch()
    with torch.no_grad():
        target = distiller.teacher(image)[0].argmax(1)
        target[-3:] += 1
    trainer = modules.engine.trainer_dict["base"]("own", split := shared.Split(distiller), [], [], cfg)
    split.train()
    for step in range(2):
        split(image=image, target=target % 100, epoch=1)
        distiller.teacher(image)  # in nobody's training step
        assert trainer.report.means()["teacher_accuracy"] == 5 / 8, step
    assert trainer.report._sums[0] == 16


def test_a_method_that_shows_the_teacher_two_views_of_each_image_is_left_alone(host):
    shared.registered(host)
    from disk_plugin.integrations.mdistiller.teacher_watch import TeacherWatch

    class TwoViews(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(4, 3)

        def forward(self, image, target):
            return self.teacher(image) + (self.teacher(-image) if image.sum() > 0 else 0), {}

    heard = []
    distiller = nn.DataParallel(TwoViews())
    TeacherWatch(distiller, lambda *told: heard.append(told))
    target = torch.arange(3)
    distiller(image=torch.ones(3, 4), target=target)
    assert heard == []
    logits, _ = distiller(image=-torch.ones(3, 4), target=target)
    ((terms, classes),) = heard
    assert torch.equal(terms.teacher_correct, (logits.argmax(1) == target).float())
    assert classes == 3


def test_small_values_are_logged_with_their_digits_and_means_over_no_sample_are_not(host, capfd, caplog):
    with_labels(host, [8] * 24)
    words = ["DISTILLER.WARM_START", constant(host, host.student, 7), "SOLVER.LR", "1e-6", "DISK.BUDGET", "0.0025"]
    folder = launch(host, *words)
    worklog = (folder / "worklog.txt").read_text()
    assert worklog.count("\nbudget: 0.002500\n") == worklog.count("\nmultiplier: 0.1000\n") == 2
    assert worklog.count("\nguide_wrong: ") == 2
    for text in (worklog, "".join(capfd.readouterr()), caplog.text):
        assert "guide_right" not in text
        assert "nan" not in text.lower()


def test_a_schedule_that_was_given_a_shorter_length_than_the_run_is_no_mistake(host):
    folder = shared.launch(
        host, "DISK.BUDGET", "0.3", "DISK.DUAL.EPOCHS", "1"
    )  # of two epochs; a warning would be an error here
    log = (folder / "worklog.txt").read_text()
    assert re.findall(r"\nmultiplier: (\S+)", log) == ["0.1000", "50.00"]


def test_a_loss_that_is_nan_is_logged_as_such(host, monkeypatch):
    modules, cfg, distiller = shared.distiller_of(host, "DISK")
    trainer = modules.engine.trainer_dict["base"]("own", nn.DataParallel(distiller), [], [], cfg)
    nan = float("nan")
    means = {"logged_loss": nan, "ce": nan, "guide_right": nan, "guide_wrong": 0.5}
    means |= {"student_accuracy": 0.0, "teacher_accuracy": 0.75}
    monkeypatch.setattr(trainer.report, "means", lambda: dict(means))
    values = trainer._epoch_values()
    assert list(values) == [
        "logged_loss",
        "ce",
        "teacher_acc",
        "guide_wrong",
        "multiplier",
        "budget",
        "discount_target",
    ]
    assert f"{values['ce']:.2f}" == "nan"


@pytest.mark.parametrize("kind", ["DISK", "DISK_SIMKD"])
@pytest.mark.parametrize("trainer", ["base", "disk", "none of ours"])
def test_ignored_labels_leave_the_loss_the_mean_over_the_others(host, kind, trainer):
    name = "disk" if trainer == "disk" else "base"
    words = ["DISK.IGNORE_INDEX", 7, "SOLVER.TRAINER", name, "DISK.ALTERNATING.GUIDE_PASSES", 1]
    modules, cfg, distiller = shared.distiller_of(host, kind, *words)
    image, target = image_batch()
    target[2:] = 7
    for part in (distiller.student, getattr(distiller, "simkd", distiller.student)):
        part.eval()  # or the samples are joined by their batch's statistics
    terms = distiller.terms(*gathered(distiller, image[:2], target[:2]), epoch=1).mean()
    wrapped = nn.DataParallel(distiller)
    if trainer != "none of ours":
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
        own = modules.engine.trainer_dict[name]("own", wrapped, [(image, target)], [], cfg)
    loss = wrapped(image=image, target=target, epoch=1)[1]["loss_disk"].mean()
    torch.testing.assert_close(loss, terms.student_loss if trainer == "disk" else terms.loss, rtol=1e-5, atol=1e-4)
    if trainer == "disk":
        expected = torch.autograd.grad(terms.guide_loss, list(distiller.disk.guide.parameters()))
        found = []
        own.guide_optimizer.step = lambda: found.extend(p.grad.clone() for p in distiller.disk.guide.parameters())
        own.core.guide_passes.run(0, own._bars(1), own._guide_loss(1))
        torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-5)
