"""Runs of the mdistiller adapter side by side: which settings tell them apart, which one is resumed, what stays."""

import importlib
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_mdistiller as shared
import torch
import yaml
from test_mdistiller import assert_same, contents, launch, load, refused, registered

host = shared.host
pytestmark = shared.pytestmark

ALLOWED = ["--resume", "--allow-changed-settings"]


def folders(host, out="out"):
    return set((host.folder / out).glob("*/*"))


def added(host, *words, **settings):
    """Launch and return the one folder that this adds."""
    before = folders(host)
    launch(host, *words, find=False, **settings)
    (folder,) = folders(host) - before
    return folder


def student(folder):
    weights = load(folder / "student_latest")["model"]
    return {name: value for name, value in weights.items() if "running" not in name and "num_batches" not in name}


def distance(left, right):
    left, right = student(left), student(right)
    return max((value - right[name]).abs().max().item() for name, value in left.items())


def test_changed_settings_go_on_with_the_run_of_the_same_seed_and_leave_every_run_where_it_is(host, capsys):
    first, second = added(host, seed=1, epochs=1), added(host, seed=2, epochs=1)
    before = {folder: contents(folder) for folder in (first, second)}
    copied = added(host, *ALLOWED, "SOLVER.LR", "1e-12", seed=1)  # so small that the weights stay those it began with
    assert f"going on with a copy of {first} under changed settings:\n  SOLVER.LR: " in capsys.readouterr().out
    assert {folder: contents(folder) for folder in (first, second)} == before
    assert load(copied / "latest")["epoch"] == 2
    assert distance(copied, first) < 1e-6 < distance(copied, second)
    assert yaml.safe_load((copied / "settings.yaml").read_text())["SOLVER.SEED"] == 1
    log, earlier = ((folder / "worklog.txt").read_text() for folder in (copied, first))
    assert [int(epoch) for epoch in re.findall(r"^epoch: (\d+)", log, re.MULTILINE)] == [1, 2]
    assert log.startswith(earlier[: earlier.index("best_acc") if "best_acc" in earlier else None])
    assert str(first) in (copied / "changed_settings.txt").read_text()


@pytest.mark.parametrize("seed", [1, None])
def test_no_flag_changes_the_seed_of_a_run(host, seed):
    folder = added(host, seed=2, epochs=1)
    message = refused(host, *ALLOWED, "SOLVER.LR", "0.01", seed=seed)
    assert f"  SOLVER.SEED: 2 then, {seed} now" in message
    assert "SOLVER.SEED cannot change within a run" in message
    assert "SOLVER.SEED cannot change within a run" in refused(host, "--resume", seed=seed)
    assert folders(host) == {folder}


def test_a_run_of_another_seed_is_no_candidate_however_near_it_is(host):
    first = added(host, "SOLVER.MOMENTUM", "0.5", seed=1, epochs=1)
    added(host, "SOLVER.LR", "1e-12", seed=2, epochs=1)  # one difference, to the first there are two
    assert distance(added(host, *ALLOWED, "SOLVER.LR", "1e-12", seed=1), first) < 1e-6


def test_a_refusal_lists_the_differences_to_the_nearest_run_whichever_is_the_newest(host):
    nearest = added(host, "DISK.BUDGET", "0.5", seed=1, epochs=1)
    newest = added(host, "DISK.BUDGET", "0.7", "SOLVER.LR", "0.02", seed=2, epochs=1)
    for flag in ("--resume", "--evaluate"):
        message = refused(host, flag, *(["best"] if flag == "--evaluate" else []), "DISK.BUDGET", "0.9", seed=1)
        assert f"{flag} found {nearest}, whose settings differ:\n  DISK.BUDGET: 0.5 then, 0.9 now" in message
        assert newest.name not in message


def test_of_runs_that_are_equally_near_none_is_taken_until_one_is_named(host):
    low, high = (added(host, "SOLVER.MOMENTUM", momentum, epochs=1) for momentum in ("0.1", "0.7"))
    words = [*ALLOWED, "SOLVER.MOMENTUM", "0.5", "SOLVER.LR", "1e-12"]
    message = refused(host, *words)
    assert "--resume found 2 runs that are equally near" in message
    for folder, momentum in ((low, 0.1), (high, 0.7)):
        differences = f"  SOLVER.LR: 0.05 then, 1e-12 now\n  SOLVER.MOMENTUM: {momentum} then, 0.5 now"
        assert f"{folder}, whose settings differ:\n{differences}\n" in message
    in_order = [str(momentum) for _, momentum in sorted([(low.name, 0.1), (high.name, 0.7)])]
    assert f"In this order they have\n  SOLVER.MOMENTUM: {', '.join(in_order)}\nName the one" in message
    assert folders(host) == {low, high}
    message = refused(host, *words, "--from", "other")
    assert f"--from must name a run in {low.parent}, one of" in message
    copied = added(host, *words, "--from", high.name)
    assert distance(copied, high) < 1e-6 < distance(copied, low)
    shutil.rmtree(copied)
    copied = added(host, *words, "--from", str(low))
    assert distance(copied, low) < 1e-6 < distance(copied, high)


def test_evaluation_takes_none_of_two_runs_that_only_their_teachers_tell_apart(host):
    other = host.folder / "other.pth"
    weights = torch.load(shared.teacher_checkpoint(host, host.teacher), weights_only=True)["model"]
    changed = {name: value + 1e-3 if value.is_floating_point() else value for name, value in weights.items()}
    torch.save(changed, other)
    runs = added(host, epochs=1), added(host, "--teacher-checkpoint", str(other), epochs=1)
    message = refused(host, "--evaluate", "best")
    assert all(str(folder) in message for folder in runs)
    assert "\n  teacher weights: " in message
    assert "--evaluate FILE" in message


def test_a_copy_holds_what_a_run_goes_on_with_and_not_its_snapshots(host):
    original = added(host, epochs=1)
    # a kill left what belongs to the epoch that is in force, and what belongs to one that never was
    for name in ("epoch_1", "student_1", "extra.1.partial", "latest.2.partial", "notes"):
        (original / name).write_text(name)
    copied = added(host, *ALLOWED, "SOLVER.LR", "0.01")
    names = {path.name for path in copied.iterdir()}
    assert {"latest", "student_latest", "best", "student_best", "worklog.txt", "notes", "extra"} <= names
    assert (copied / "extra").read_text() == "extra.1.partial"
    assert not {"epoch_1", "student_1", "latest.2.partial"} & names
    # what is written in place in one folder leaves the other's alone
    assert not any((copied / name).samefile(original / name) for name in names & {p.name for p in original.iterdir()})


@pytest.mark.parametrize("killed", [False, True])
def test_a_copy_that_is_interrupted_leaves_nothing_and_is_made_anew(host, monkeypatch, killed):
    original = added(host, epochs=1)
    before = contents(original)
    rename, rmtree = Path.rename, shutil.rmtree

    def interrupt(path, target):
        if path.name.endswith(".copying"):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupt)
        if killed:  # nothing is cleaned up
            patched.setattr(shutil, "rmtree", lambda path, **_: None)
        with pytest.raises(KeyboardInterrupt):
            launch(host, *ALLOWED, "SOLVER.LR", "0.01", find=False)
    rest = folders(host) - {original}
    assert [path.suffix for path in rest] == ([".copying"] if killed else [])
    for path in rest:
        (path / "half").touch()
    assert "SOLVER.LR: " in refused(host, "--resume", "SOLVER.LR", "0.01")  # there is no such run
    launch(host, *ALLOWED, "SOLVER.LR", "0.01", find=False)
    (copied,) = folders(host) - {original}
    assert load(copied / "latest")["epoch"] == 2
    assert not (copied / "half").exists()
    assert contents(original) == before
    assert rmtree is shutil.rmtree


def test_a_copy_that_trains_no_epoch_is_gone_again_and_says_so(host, capsys):
    original = added(host, epochs=1)
    assert "Invalid momentum value: -1.0" in refused(host, *ALLOWED, "SOLVER.MOMENTUM", "-1.0")
    assert folders(host) == {original}
    assert f"no epoch was trained under the changed settings: {original.parent}/" in capsys.readouterr().out
    assert load(original / "latest")["epoch"] == 1


def fork(host):
    """A fork of the host with a key and a method of its own, which reads DiSK's section."""
    root = host.folder / "fork"
    shutil.copytree(host.root, root, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    with (root / "mdistiller/engine/cfg.py").open("a") as file:
        file.write("\nCFG.EXPERIMENT.LOGIT_STAND = False\n")
    with (root / "mdistiller/distillers/__init__.py").open("a") as file:
        file.write("\n\nclass Third(distiller_dict['KD']):\n    def __init__(self, student, teacher, cfg):\n")
        file.write("        super().__init__(student, teacher, cfg)\n        self.budget = cfg.DISK.BUDGET\n")
        file.write("\n\ndistiller_dict['THIRD'] = Third\n")
    host.root = root
    return host


@pytest.mark.parametrize(
    ("distiller", "key", "then", "now"),
    [
        ("KD", "EXPERIMENT.LOGIT_STAND", "False", "True"),
        ("KD", "EXPERIMENT.LOGIT_STAND", "True", "False"),
        ("THIRD", "DISK.BUDGET", "0.3", "0.7"),
        ("DISK", "KD.TEMPERATURE", "4", "2"),
    ],
)
def test_a_key_of_any_section_tells_runs_apart(host, distiller, key, then, now):
    fork(host)
    folder = added(host, key, then, distiller=distiller, epochs=1)
    message = refused(host, "--resume", key, now, distiller=distiller)
    assert f"--resume found {folder}, whose settings differ:\n  {key}: {then} then, {now} now\n" in message
    launch(host, "--resume", key, then, distiller=distiller, find=False)
    assert load(folder / "latest")["epoch"] == 2
    added(host, key, now, distiller=distiller, epochs=1)


def test_what_cannot_change_the_training_may_change_from_start_to_start(host):
    words = ["DATASET.TEST.BATCH_SIZE", "4", "DATASET.NUM_WORKERS", "1", "LOG.SAVE_CHECKPOINT_FREQ", "7"]
    folder = launch(host, epochs=1)
    assert launch(host, "--resume", *words, epochs=2) == folder
    assert load(folder / "latest")["epoch"] == 2


OLDER = re.compile(r"DISTILLER\.|SOLVER\.|DISK\.|DATASET\.TYPE$|data$|teacher weights$")


def made_older(folder):
    """Bring a run into the form in which earlier versions recorded it, under a hash of theirs."""
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    settings = {key: value for key, value in settings.items() if OLDER.match(key)}
    settings["data"] = settings["data"].partition(",")[0]
    assert re.fullmatch(r"files of \d+ and \d+ bytes", settings["data"])
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return folder.rename(folder.with_name(f"{folder.name.rpartition('-')[0]}-0123abcd"))


PAPER = ["DISK.BUDGET", "0.3"]  # what bounded g in those versions


def test_a_run_whose_settings_an_earlier_version_recorded_goes_on_with_a_word_on_the_others(host, capsys):
    folder = launch(host, *PAPER, epochs=1)
    older = made_older(folder)
    assert f"--resume found {older}, whose settings differ:\n  DISK.BUDGET: 0.3 then, 0.7 now\n" in refused(
        host, *PAPER, "--resume", "DISK.BUDGET", "0.7"
    )
    assert f"{older} holds an earlier run with these settings" in refused(host, *PAPER)
    capsys.readouterr()
    launch(host, *PAPER, "--resume", "KD.TEMPERATURE", "3", find=False)
    printed = capsys.readouterr().out
    assert f"note: {older} was started by a version that recorded DISTILLER, SOLVER, its distiller's own" in printed
    assert "not at their defaults: KD.TEMPERATURE\n" in printed
    (now,) = folders(host)
    assert now not in (older, folder)
    assert load(now / "latest")["epoch"] == 2
    message = refused(host, *PAPER, "--resume", "KD.TEMPERATURE", "4")  # from here it is recorded
    assert f"{now}, whose settings differ:\n  KD.TEMPERATURE: 3 then, 4 now\n" in message


def test_of_an_older_run_and_one_with_the_very_settings_the_second_goes_on(host):
    older = made_older(added(host, *PAPER, epochs=1))
    very = added(host, *PAPER, "KD.TEMPERATURE", "3", epochs=1)  # the older one may have had it or not: it bars nothing
    launch(host, *PAPER, "--resume", "KD.TEMPERATURE", "3", epochs=2, find=False)
    assert [load(folder / "latest")["epoch"] for folder in (older, very)] == [1, 2]


def test_an_older_run_is_overwritten_where_it_lies(host):
    older = made_older(launch(host, *PAPER, epochs=1))
    folder = launch(host, *PAPER, "--overwrite", epochs=1)
    assert folder != older
    assert folders(host) == {folder}


def rewritten(host, *, labels=False, images=False, out="changed"):
    """The test's data with other labels or images, in files of the same size."""
    folder = host.folder / out / "cifar-100-python"
    shutil.copytree(host.folder / "data" / "cifar-100-python", folder)
    content = pickle.loads((folder / "train").read_bytes())
    if labels:
        content["fine_labels"] = content["fine_labels"][::-1]
    if images:
        content["data"] = np.ascontiguousarray(content["data"][::-1])
    size = (folder / "train").stat().st_size
    (folder / "train").write_bytes(pickle.dumps(content))
    assert (folder / "train").stat().st_size == size
    return str(folder.parent)


@pytest.mark.parametrize("change", ["labels", "images"])
def test_other_data_of_equal_size_are_other_data_and_the_same_elsewhere_are_the_same(host, change):
    folder = launch(host, epochs=1)
    message = refused(host, "--resume", "--data-root", rewritten(host, **{change: True}))
    assert re.search(r"\n  data: (files of \d+ and \d+ bytes), \w+ then, \1, \w+ now\n", message)
    assert launch(host, "--resume", "--data-root", rewritten(host, out="same")) == folder
    assert load(folder / "latest")["epoch"] == 2


def images_in(root, kind="imagenet"):
    for split, number in (("train", 3), ("val", 1)):
        for label in ("cat", "dog"):
            folder = root / split / label / ("images" if kind == "tiny_imagenet" and split == "train" else "")
            folder.mkdir(parents=True)
            for name in range(number):
                (folder / f"{label}{name}.JPEG").write_bytes(bytes(10 + name))
    return root


@pytest.mark.parametrize("kind", ["imagenet", "tiny_imagenet"])
def test_folders_of_images_are_told_apart_by_names_labels_and_sizes(host, kind):
    modules = registered(host)
    cfg = modules.engine_cfg.CFG.clone()
    cfg.DATASET.TYPE = kind
    adapter = importlib.import_module("disk_plugin.integrations.mdistiller.host")
    if not (host.root / "mdistiller" / "dataset" / f"{kind}.py").is_file():
        pytest.skip(f"a fork without {kind}")

    def fingerprint(root):
        adapter.use_data(cfg, str(root))
        return adapter.fingerprint_data(cfg, str(root))

    first = fingerprint(images_in(host.folder / "a", kind))
    assert re.fullmatch(r"2 and 2 folders, [0-9a-f]{16}", first)
    same = images_in(host.folder / "b", kind)
    (same / "train" / ".DS_Store").touch()
    assert fingerprint(same) == first
    seen = {first}
    for number, change in enumerate(("rename", "relabel", "resize", "validation")):
        root = images_in(host.folder / str(number), kind)
        image = next((root / "train").rglob("cat0.JPEG"))
        if change == "rename":
            image.rename(image.with_name("cat7.JPEG"))
        elif change == "relabel":
            image.rename(next((root / "train" / "dog").rglob("dog0.JPEG")).with_name("cat0.JPEG"))
        elif change == "resize":
            image.write_bytes(bytes(99))
        else:
            (root / "val" / "dog" / "dog0.JPEG").rename(root / "val" / "cat" / "dog0.JPEG")
        seen.add(fingerprint(root))
    assert len(seen) == 5


@pytest.mark.parametrize("kind", ["imagenet", "cifar100"])
def test_the_hosts_own_folder_of_images_is_looked_into_and_cifar_is_what_the_host_checks_itself(host, kind):
    modules = registered(host)
    cfg = modules.engine_cfg.CFG.clone()
    cfg.DATASET.TYPE = kind
    adapter = importlib.import_module("disk_plugin.integrations.mdistiller.host")
    importlib.import_module("mdistiller.dataset.imagenet").data_folder = str(images_in(host.folder / "own"))
    printed = adapter.fingerprint_data(cfg, None)
    assert (
        printed == "the host's" if kind == "cifar100" else re.fullmatch("the host's, 2 and 2 folders, .{16}", printed)
    )


@pytest.mark.parametrize(("seed", "cure"), [(None, "--seed N (it has no seed)"), (1, "another --seed than 1")])
def test_a_repeated_run_is_told_of_the_seed_beside_resume_and_overwrite(host, seed, cure):
    folder = launch(host, seed=seed, epochs=1)
    message = refused(host, seed=seed, epochs=1)
    for words in (str(folder), "--resume", "--overwrite", f"repeat it beside the first by {cure}"):
        assert words in message
    added(host, seed=3, epochs=1)


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_kept_from_an_interrupted_overwrite_is_told_of_at_every_start(host, begun):
    folder = launch(host, epochs=1)
    (folder / "mark").touch()
    aside = folder.rename(folder.with_name(f"{folder.name}.overwritten"))
    if begun:  # killed in its first epoch
        folder.mkdir()
        for name in ("settings.yaml", "worklog.txt"):
            (folder / name).touch()
    for words in ([], ["--resume"], [*ALLOWED, "--from", folder.name]):
        message = refused(host, *words, epochs=1)
        assert (
            f"{aside} holds an earlier run, which an --overwrite that has come to no checkpoint was to replace"
            in message
        )
        assert f"move it back to {folder}" in message
    assert f"an interrupted --overwrite left {aside}" in refused(host, "--evaluate", "best")
    assert f"an interrupted --overwrite left {aside}" in refused(host, "--resume", "SOLVER.LR", "0.01")
    assert (aside / "mark").exists()
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    assert launch(host, "--resume") == folder
    assert load(folder / "latest")["epoch"] == 2


def test_an_interrupted_overwrite_may_be_made_again(host):
    folder = launch(host, epochs=1)
    (folder / "mark").touch()
    aside = folder.rename(folder.with_name(f"{folder.name}.overwritten"))
    folder.mkdir()
    (folder / "half").touch()
    launch(host, "--overwrite", epochs=1)
    assert not aside.exists()
    assert not (folder / "mark").exists()
    assert not (folder / "half").exists()


def test_a_run_that_a_killed_one_had_replaced_is_deleted_at_the_next_start(host):
    folder = launch(host, epochs=1)
    aside = folder.with_name(f"{folder.name}.overwritten")
    shutil.copytree(folder, aside)
    assert "holds an earlier run with these settings" in refused(host, epochs=1)
    assert folders(host) == {folder}


@pytest.mark.parametrize("content", ["", "[1]", "a: ["])
def test_a_folder_whose_settings_cannot_be_read_is_named(host, content):
    folder = launch(host, epochs=1)
    (folder / "settings.yaml").write_text(content)
    assert f"{folder / 'settings.yaml'} must " in refused(host, "--resume")


def test_a_checkpoint_without_settings_is_not_deleted(host):
    folder = added(host, "SOLVER.LR", "0.01", epochs=1)
    added(host, epochs=1)
    (folder / "settings.yaml").unlink()
    assert f"{folder} holds a checkpoint without settings.yaml" in refused(host, *ALLOWED, "SOLVER.LR", "0.01")
    assert (folder / "latest").is_file()


@pytest.mark.parametrize("words", [["--allow-changed-settings"], ["--from", "folder"]])
def test_a_flag_that_says_how_to_resume_needs_resume(host, words):
    assert "give --resume too" in refused(host, *words)
    assert not (host.folder / "out").exists()


def test_each_run_of_a_sweep_that_was_interrupted_goes_on_with_its_own(host, monkeypatch):
    cells = [(seed, budget) for seed in (1, 2) for budget in ("0.1", "0.5")]
    step, steps = torch.optim.SGD.step, []

    def interrupt(*arguments, **keywords):
        steps.append(1)
        if len(steps) == 5:  # in the second epoch of three steps
            raise KeyboardInterrupt
        return step(*arguments, **keywords)

    for seed, budget in cells:
        launch(host, "DISK.BUDGET", budget, seed=seed, epochs=2, out="whole", find=False)
        steps.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.SGD, "step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                launch(host, "DISK.BUDGET", budget, seed=seed, epochs=2, find=False)
    names = {folder.name: load(folder / "latest")["epoch"] for folder in folders(host)}
    assert list(names.values()) == [1] * 4
    for seed, budget in reversed(cells):
        launch(host, "DISK.BUDGET", budget, "--resume", seed=seed, epochs=2, find=False)
    assert {folder.name for folder in folders(host)} == set(names)
    for folder in folders(host, "whole"):
        assert_same(load(host.folder / "out" / folder.parent.name / folder.name / "latest"), load(folder / "latest"))


def test_a_run_of_an_earlier_version_or_with_an_import_that_it_did_not_use_is_resumed_and_evaluated(host):
    folder = launch(host, distiller="DISK_SIMKD", epochs=1)
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    earlier = {"DISK_SIMKD.GUIDE_LOGITS": None, "HINTS.BIAS": True, "DISK_HINTS.WEIGHT": "guide"}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings | earlier))
    launch(host, "--evaluate", "best", distiller="DISK_SIMKD", find=False)
    assert load(launch(host, "--resume", distiller="DISK_SIMKD", epochs=2) / "latest")["epoch"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DISK_DKD.WEIGHT", "half"], "weight must be one of"),
        (["DISK_DKD.LOSS_WEIGHT", "-1.0"], "DISK_DKD.LOSS_WEIGHT must be >= 0, got -1.0"),
        (["DISK_DKD.BETA", "-1.0"], "beta must be >= 0, got -1.0"),
    ],
)
def test_settings_of_a_method_that_cannot_be_are_told_before_a_folder_is_made(host, words, message):
    assert message in refused(host, *words, distiller="DISK_DKD")
    assert not (host.folder / "out").exists()


@pytest.mark.parametrize(("name", "message"), [("KD", "as the host has a KD"), ("Teacher", "rename it")])
def test_a_method_of_the_users_own_takes_no_name_that_is_there(host, tmp_path, monkeypatch, name, message):
    source = f"from disk_plugin.features import Method\nclass {name}(Method): pass\n"
    (tmp_path / f"takes_{name.lower()}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert message in refused(host, "--import", f"takes_{name.lower()}")


def test_disk_alone_logs_nothing_of_a_method(host):
    assert "feature" not in (launch(host) / "worklog.txt").read_text()
    assert "feature" in (launch(host, distiller="DISK_DKD", out="dkd") / "worklog.txt").read_text()
