"""The launcher, around a stand-in script always and timm's real train.py where ``DISK_TIMM_TRAIN`` names one."""

import argparse
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

timm = pytest.importorskip("timm")

from timm.models import create_model  # noqa: E402
from timm.models._hub import save_for_hf  # noqa: E402

from disk_plugin.uniform import UniformGuide  # noqa: E402

STANDIN = Path(__file__).parent / "standins" / "timm" / "train.py"
REAL = os.environ.get("DISK_TIMM_TRAIN")
needs_real = pytest.mark.skipif(not REAL, reason="DISK_TIMM_TRAIN does not name timm's train.py")
CLASSES = 5
LOGGED = ["multiplier", "budget", "usage", "guide_right", "guide_wrong", "discount_right", "discount_wrong"]
LOGGED += ["student_top1", "teacher_top1", "task_loss", "logged_loss", "divergence"]


@pytest.fixture(params=["stand-in", pytest.param("checkout", marks=needs_real)])
def script(request):
    return str(STANDIN) if request.param == "stand-in" else REAL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher's checkpoint, with trained-looking statistics, and random images."""
    root = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    for classes in (CLASSES, 7):
        teacher = create_model("test_resnet", num_classes=classes)
        torch.save({"state_dict": teacher.state_dict()}, root / f"teacher{classes}.pth")
        own = argparse.Namespace(model="test_resnet", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
        torch.save({"state_dict": teacher.state_dict(), "args": own}, root / f"own{classes}.pth")
        save_for_hf(teacher, str(root / f"local{classes}"))
    if REAL:
        from PIL import Image

        for split, count in (("train", 10), ("validation", 4)):
            for label in range(CLASSES):
                (root / "data" / split / f"c{label}").mkdir(parents=True)
                for index in range(count):
                    pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
                    Image.fromarray(pixels).save(root / "data" / split / f"c{label}" / f"{index}.png")
    return root


def command(script, folder, words, teacher="test_resnet"):
    checkpoint = [] if teacher.startswith("local-dir") else ["--disk-teacher-checkpoint", str(folder / "teacher5.pth")]
    checkpoint = [] if "--disk-teacher-checkpoint" in words else checkpoint
    given = ["--model", "test_vit", "--kd-model-name", teacher, "--img-size", "32", "--num-classes", str(CLASSES)]
    given += ["--output", str(folder / "out")]
    if script == REAL:
        given += ["--data-dir", str(folder / "data"), "-b", "8", "-j", "1", "--device", "cpu", "--warmup-epochs", "0"]
        given += ["--lr", "0.05", "--input-size", "3", "32", "32"]
        given += [] if "--epochs" in words else ["--epochs", "2"]
    return ["-m", "disk_plugin.integrations.timm", script, *given, *checkpoint, *map(str, words)]


def launch(script, folder, *words, teacher="test_resnet", processes=1, ends=0):
    """Run the launcher as a user would; return what it printed."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, *run, *command(script, folder, words, teacher)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    output = ended.stdout + ended.stderr
    assert ended.returncode == ends, output[-3000:]
    return output


def checkpoint(folder, experiment):
    return torch.load(folder / "out" / experiment / "last.pth.tar", weights_only=False)


def assert_same(left, right, where="checkpoint"):
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def test_it_trains_logs_and_leaves_a_bare_student(script, folder):
    words = ["--model-ema", "--disk-top-k", 3, "--disk-budget", 0.6, 0.4, "--disk-period", 2]
    output = launch(script, folder, "--experiment", "plain", *words)
    lines = [line for line in output.splitlines() if re.match(r".*DiSK: \d ", line)]
    assert len(lines) == 2
    assert all(f"{name}: " in line for line in lines for name in LOGGED)
    with (folder / "out" / "plain" / "summary.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert float(rows[0]["train_disk_budget"]) > float(rows[1]["train_disk_budget"])
    assert all(f"train_disk_{name}" in row for row in rows for name in LOGGED)
    saved = checkpoint(folder, "plain")
    # the real script keeps the size that the model was made for
    student = create_model("test_vit", num_classes=CLASSES, **({} if script == REAL else {"img_size": 32}))
    for key in ("state_dict", "state_dict_ema"):
        student.load_state_dict(saved[key])
    settings = yaml.safe_load((folder / "out" / "plain" / "args.yaml").read_text())
    assert (settings["disk_top_k"], settings["disk_budget"]) == (3, [0.6, 0.4])
    assert saved["args"].disk_top_k == 3


@pytest.mark.parametrize("words", [[], ["--disk-mode", "alternating", "--disk-student-passes", 2, "--disk-replay"]])
def test_a_resumed_run_goes_on_and_says_what_was_changed(script, folder, words):
    name = f"resumed{len(words)}"
    four = ["--disk-epochs", 4, "--disk-period", 4, *words]
    launch(script, folder, "--experiment", f"{name}a", *four)
    last = folder / "out" / f"{name}a" / "last.pth.tar"
    output = launch(
        script, folder, "--experiment", f"{name}b", "--epochs", 4, "--resume", last, *four, "--disk-top-k", 2
    )
    assert "Resumed with another disk_top_k: 2, was None" in output
    assert re.findall(r"DiSK: (\d) multiplier", output) == ["2", "3"]
    state = checkpoint(folder, f"{name}b")["task_state"]
    assert state["dual"]["epoch"] == (2 if words else 4)
    assert ("guide_passes" in state) == bool(words)
    assert ("generator" in state.get("guide_passes", {})) == bool(words)  # the replay's


def test_one_g_for_all_trains_in_place_of_a_guide_and_resumes(script, folder):
    words = ["--disk-uniform", "--disk-discount", 0.3, "--disk-epochs", 4]
    output = launch(script, folder, "--experiment", "uniform", *words)
    assert "guide of 0 parameters" in output
    saved = checkpoint(folder, "uniform")
    create_model("test_vit", num_classes=CLASSES, **({} if script == REAL else {"img_size": 32})).load_state_dict(
        saved["state_dict"]
    )
    state = saved["task_state"]["disk"]
    assert {name for name in state if name.startswith("guide.")} == {
        f"guide.{name}" for name in UniformGuide(0.5).state_dict()
    }
    assert -16 < state["guide.log_guide"] < 0
    last = folder / "out" / "uniform" / "last.pth.tar"
    output = launch(script, folder, "--experiment", "uniform4", *words, "--epochs", 4, "--resume", last)
    assert re.findall(r"DiSK: (\d) multiplier", output) == ["2", "3"]
    assert "untrained guide" not in output


def test_a_resumed_stand_in_run_equals_an_uninterrupted_one_bit_for_bit(folder):
    """One process of the real script draws its batches from the whole run's random numbers, whatever the task."""
    words = ["--cooldown-epochs", 2, "--model-ema"]  # four epochs in all, from the first on
    launch(str(STANDIN), folder, "--experiment", "whole", *words)
    # the same run, stopped after its second epoch
    first = folder / "out" / "whole" / "checkpoint-1.pth.tar"
    launch(str(STANDIN), folder, "--experiment", "half", *words, "--resume", first)
    left, right = checkpoint(folder, "whole"), checkpoint(folder, "half")
    for key in ("state_dict", "state_dict_ema", "optimizer", "task_state"):
        assert_same(left[key], right[key], key)
    assert left["task_state"]["dual"]["epoch"] == 4


@needs_real
def test_in_half_precision_a_resumed_run_with_replay_equals_an_uninterrupted_one_bit_for_bit(folder):
    """Alternating, replay, AMP, EMA, accumulation; in two processes, whose samplers follow the epoch alone."""
    words = ["--disk-mode", "alternating", "--disk-replay", "--amp", "--amp-dtype", "bfloat16", "--model-ema"]
    words += ["--grad-accum-steps", 2, "--model", "test_efficientnet", "--epochs", 6, "--no-aug", "--disk-period", 2]
    output = launch(REAL, folder, "--experiment", "halfwhole", *words, processes=2)
    assert re.findall(r"DiSK: (\d) multiplier", output) == list("012345")
    fourth = folder / "out" / "halfwhole" / "checkpoint-3.pth.tar"
    output = launch(REAL, folder, "--experiment", "halfresumed", *words, "--resume", fourth, processes=2)
    assert re.findall(r"DiSK: (\d) multiplier", output) == ["4", "5"]
    left, right = checkpoint(folder, "halfwhole"), checkpoint(folder, "halfresumed")
    for key in ("epoch", "state_dict", "state_dict_ema", "optimizer", "task_state"):
        assert_same(left[key], right[key], key)
    assert all(value.isfinite().all() for value in left["state_dict"].values())
    assert left["task_state"]["guide_passes"]["passes"] == 3  # over the data; the replay's came after


@pytest.mark.parametrize("given", [[], ["--mean", 0, 0, 0, "--std", 1, 1, 1]])
def test_the_runs_normalisation_and_the_teachers_own_are_followed(script, folder, given):
    """The student's defaults, or what the run was told; the teacher's from the arguments in its checkpoint."""
    words = ["--epochs", 1, *given, "--disk-teacher-checkpoint", folder / "own5.pth"]
    output = launch(script, folder, "--experiment", f"norm{len(given)}{script == REAL}", *words)
    images = "mean 0 0 0, std 1 1 1" if given else "mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    assert f"DiSK: images {images}; teacher's own mean 0.1 0.2 0.3, std 0.4 0.5 0.6" in output


def test_without_a_validation_split_the_task_loss_ranks_the_checkpoints(script, folder):
    """The whole loss rises with the multiplier, so that the first epoch would be the best whatever is learnt."""
    words = ["--epochs", 4, "--val-split", "", "--lr", 0.01, "--disk-period", 4, "--disk-multiplier", 0.1, 400]
    name = "unvalidated-real" if script == REAL else "unvalidated"
    output = launch(script, folder, "--experiment", name, *words, "--disk-budget", 0, "--smoothing", 0)
    assert "no validation split: loss, which ranks the checkpoints, is the task loss alone" in output
    with (folder / "out" / name / "summary.csv").open() as table:
        rows = list(csv.DictReader(table))
    task_loss = [float(row["train_disk_task_loss"]) for row in rows]
    assert [float(row["train_loss"]) for row in rows] == task_loss
    # the case in point: the whole loss would have ranked otherwise
    whole = [float(row["train_disk_loss"]) for row in rows]
    assert whole.index(min(whole)) != task_loss.index(min(task_loss))
    best = torch.load(folder / "out" / name / "model_best.pth.tar", weights_only=False)
    assert (best["epoch"], best["metric"]) == (task_loss.index(min(task_loss)), min(task_loss))


@needs_real
def test_with_a_validation_split_the_hosts_loss_is_left_alone(folder):
    launch(REAL, folder, "--experiment", "validated", "--epochs", 1)
    with (folder / "out" / "validated" / "summary.csv").open() as table:
        (row,) = csv.DictReader(table)
    assert float(row["train_loss"]) != float(row["train_disk_task_loss"])
    assert "train_disk_loss" not in row


def test_a_resume_with_another_optimizer_says_what_changed(script, folder):
    name = "optimizer-real" if script == REAL else "optimizer"
    launch(script, folder, "--experiment", name, "--epochs", 1, "--disk-epochs", 4)
    words = ["--experiment", f"{name}2", "--epochs", 2, "--disk-epochs", 4]
    words += ["--resume", folder / "out" / name / "last.pth.tar"]
    refused = launch(script, folder, *words, "--opt", "adamw", ends=1)
    assert "error: the checkpoint's optimizer is that of --opt sgd, got --opt adamw: give --opt sgd, or" in refused
    refused = launch(script, folder, *words, "--weight-decay", 0.0 if script == REAL else 0.05, ends=1)
    assert re.search(r"must have this run's \d parameter groups, got \d: weight_decay was [\d.e-]+, is", refused)
    assert not (folder / "out" / f"{name}2").exists()
    output = launch(script, folder, *words, "--opt", "adamw", "--no-resume-opt")
    assert "DiSK: 1 multiplier" in output
    output = launch(script, folder, *words[2:], "--experiment", f"{name}3", "--lr", 0.001, "--momentum", 0.5)
    assert "Resumed with another lr: 0.001, but the optimizer's state brings 0.05 along (--no-resume-opt" in output
    group = checkpoint(folder, f"{name}3")["optimizer"]["param_groups"][0]
    assert (group["initial_lr"], group["momentum"]) == (0.05, 0.9)  # as the warning says


def test_an_optimizer_of_another_kind_in_a_file_without_arguments_is_refused(folder):
    launch(str(STANDIN), folder, "--experiment", "kind", "--epochs", 1)
    saved = checkpoint(folder, "kind")
    del saved["args"]
    torch.save(saved, folder / "kind.pth")
    refused = launch(
        str(STANDIN), folder, "--experiment", "kind2", "--resume", folder / "kind.pth", "--opt", "adamw", ends=1
    )
    assert re.search(r"must have the settings of AdamW, got one without \['betas', 'eps'\]", refused)


def test_simkd_trains_and_saves_what_predicts(script, folder):
    launch(
        script, folder, "--experiment", "simkd", "--disk-feature-matching", "simkd", "--disk-feature-weight", "guide"
    )
    keys = checkpoint(folder, "simkd")["state_dict"]
    assert {key.split(".")[0] for key in keys} == {"student", "simkd"}


def test_cifd_fits_its_modules_before_the_first_epoch_and_not_again_when_resumed(script, folder):
    words = ["--disk-method", "cifd", "--disk-cifd-rdm-epochs", 2, "--disk-cifd-distortion-weights", 1e3, 1e2]
    words += ["--model-ema", *(["--amp", "--amp-dtype", "bfloat16"] if script == REAL else [])]
    output = launch(script, folder, "--experiment", "cifd", *words)
    assert output.count("DiSK: cifd before training:") == 1
    assert re.search(r"\| 100 \| \d+\.\d \|", output)
    saved = checkpoint(folder, "cifd")
    student = create_model("test_vit", num_classes=CLASSES, img_size=32)
    assert set(saved["state_dict"]) == set(saved["state_dict_ema"]) == set(student.state_dict())
    modules = saved["task_state"]["method"]["embeddings.rdms.encoder.0.weight"]
    output = launch(
        script, folder, "--experiment", "cifd2", *words, "--epochs", 4,
        "--resume", folder / "out" / "cifd" / "last.pth.tar",
    )  # fmt: skip
    assert "before training" not in output
    resumed = checkpoint(folder, "cifd2")["task_state"]["method"]
    assert torch.equal(resumed["embeddings.rdms.encoder.0.weight"], modules)
    assert resumed["dropout.step"] == 2 * saved["task_state"]["method"]["dropout.step"]


def test_scalekd_tells_its_parameters_trains_and_leaves_the_student_bare(script, folder):
    words = ["--disk-method", "scalekd", "--disk-scalekd-dc-removed-weight", 0, "--disk-scalekd-norm", "layer"]
    words += ["--model-ema"]
    output = launch(script, folder, "--experiment", "scalekd", *words)
    assert re.search(r"DiSK: ScaleKD trains [\d,]+ parameters of its own beside the student's", output)
    assert re.search(r"DiSK: 1 multiplier: .*feature: \d", output)
    saved = checkpoint(folder, "scalekd")
    assert saved["state_dict"].keys() == create_model("test_vit", num_classes=CLASSES, img_size=32).state_dict().keys()
    assert not any("tail" in key for key in saved["task_state"]["method"])
    last = folder / "out" / "scalekd" / "last.pth.tar"
    launch(script, folder, "--experiment", "scalekd2", *words, "--epochs", 4, "--resume", last)
    assert checkpoint(folder, "scalekd2")["epoch"] == 3


def test_scalekd_is_refused_in_one_line_before_a_folder_is_made(folder):
    for words, message in (
        (["--disk-scalekd-main-heads", 7], "error: main_heads must divide the teacher's width 96, one of "),
        ([], "error: the teacher's final map has size 1 x 1, so that nothing is left without its mean"),
    ):
        words = ["--experiment", "refused", "--disk-method", "scalekd", *words]
        assert launch(str(STANDIN), folder, *words, ends=1).splitlines()[-1].startswith(message)
    assert not (folder / "out" / "refused").exists()


def test_a_method_of_the_users_own_trains_and_leaves_the_student_bare(script, folder):
    page = (Path(__file__).parents[1] / "docs" / "write_a_method.md").read_text()
    (source,) = re.findall(r"```python\n# my_methods\.py\n(.*?)```", page, re.DOTALL)
    (folder / "my_methods.py").write_text(source)
    words = ["--disk-method", "hints", "--disk-feature-weight", "one_minus_discount", "--no-disk-hints-bias"]
    output = launch(script, folder, "--experiment", "hints", "--disk-import", "my_methods", *words)
    assert re.search(r"DiSK: 1 multiplier: .*feature: \d", output)
    saved = checkpoint(folder, "hints")
    assert "simkd" not in str(saved["state_dict"].keys())
    assert saved["task_state"]["method"].keys() == {"regressor.weight"}
    for text in ("disk_import: my_methods\n", "disk_import: [my_methods]\n", "disk_import:\n  - my_methods\n"):
        (folder / "own.yaml").write_text(text + "disk_method: hints\n")
        launch(script, folder, "--experiment", f"yaml{len(text)}", "-c", folder / "own.yaml", "--epochs", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--disk-import", "nothing_there"],
            "--disk-import must name a module that can be imported, got nothing_there",
        ),
        (["--disk-method", "dkd", "--disk-feature-matching", "simkd"], r"are one setting, got \['dkd', 'simkd'\]"),
        (["--disk-dkd-beta", 2.0], "disk_dkd_beta 2.0 changes nothing without --disk-method dkd"),
        (["--disk-feature-weight", "guide"], "disk_feature_weight guide changes nothing without --disk-method"),
        (["--disk-method", "dkd", "--disk-dkd-temperature", 0.0], "temperature must be > 0, got 0.0"),
    ],
)
def test_methods_that_cannot_be_end_with_what_was_expected(words, message, folder):
    assert re.search(message, launch(str(STANDIN), folder, *words, ends=1))


def test_a_local_teacher_and_a_yaml_file_work_and_a_checkpoint_without_a_guide_needs_leave(script, folder):
    config = folder / "config.yaml"
    config.write_text("disk_top_k: 2\ndisk_multiplier: [1.0, 1.0]\n")
    local = f"local-dir:{folder / 'local5'}"
    output = launch(script, folder, "--experiment", "yaml", "-c", config, teacher=local)
    assert "multiplier: 1 " in output
    saved = checkpoint(folder, "yaml")
    assert saved["args"].disk_top_k == 2
    del saved["task_state"]
    torch.save(saved, folder / "bare.pth")
    fresh = "fresh-real" if script == REAL else "fresh"
    words = ["--experiment", fresh, "--epochs", 3, "--resume", folder / "bare.pth"]
    refused = launch(script, folder, *words, ends=1)
    assert "error: the checkpoint must hold DiSK's state" in refused
    assert not (folder / "out" / fresh).exists()
    output = launch(script, folder, *words, "--disk-allow-fresh-guide")
    assert "untrained guide" in output
    assert "Resumed with 3 epochs, was 2: multiplier and budget now follow the schedule of 3" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--disk-budget", "-1"], "error: budget must be >= 0, got -1.0"),
        (["--disk-budget", 1, 2, 3], "error: disk_budget must be one number, or upper and lower, got [1.0, 2.0, 3.0]"),
        (["--disk-variant", "offical"], "invalid choice: 'offical'"),
        (["--disk-topk", 3], "unrecognized arguments: --disk-topk"),
        (["--kd-distill-type", "feature"], "error: DiSK takes the place of --kd-distill-type logit, got feature"),
        (["--bce-loss"], "error: DiSK does not go with --bce-loss: a sigmoid per class"),
        (["--jsd-loss"], "--jsd-loss: its cross-entropy is on the first of each image's views only, the others"),
        (["--num-classes", 6], "teacher5.pth has 5 classes, the student 6"),
        (
            ["--disk-teacher-checkpoint", "nowhere.pth"],
            "error: expected the teacher's weights, found no file nowhere.pth",
        ),
        (["--disk-teacher-checkpoint", "{folder}/typo.yaml"], "typo.yaml, which cannot be loaded: "),
        (["--resume", "nowhere.pth"], "error: [Errno 2] No such file or directory: 'nowhere.pth'"),
        (["--resume", "{folder}/teacher5.pth"], "error: "),
        (["-c", "{folder}/nowhere.yaml"], "nowhere.yaml; shipped are configs/imagenet/cifd_r34_r18.yaml"),
        (["-c", "{folder}/type.yaml"], "error: disk_guide_hidden_dims must be a list, got int 64"),
        (["--disk-uniform", "--disk-budget", 0.3], "got discount auto, rule cosine and ['disk_budget']"),
        (["--disk-uniform", "--disk-mode", "alternating"], "has no guide that --disk-mode alternating could train"),
        (
            ["--disk-uniform", "--disk-guide-norm", "batch"],
            "disk_guide_norm batch changes nothing without --no-disk-un",
        ),
        (["--disk-guide-lr", 0.7], "error: disk_guide_lr 0.7 changes nothing without --disk-mode alternating"),
        (
            ["--disk-mode", "alternating", "--disk-replay-capacity", 9],
            "error: disk_replay_capacity 9 changes nothing without --disk-replay",
        ),
        (["-c", "{folder}/typo.yaml"], "error: unknown settings ['disk_topk']; known are"),
        (["-c", "{folder}/value.yaml"], "error: disk_mode must be one of ['joint', 'alternating'], got 'both'"),
    ],
)
def test_bad_input_ends_with_what_was_expected_and_what_came_before_anything_is_written(script, folder, words, message):
    (folder / "typo.yaml").write_text("disk_topk: 3\n")
    (folder / "type.yaml").write_text("disk_guide_hidden_dims: 64\n")
    (folder / "value.yaml").write_text("disk_mode: both\n")
    words = [str(word).format(folder=folder) for word in words]
    ends = 2 if "invalid" in message or "unrecognized" in message else 1
    assert message in launch(script, folder, "--experiment", "bad", *words, ends=ends)
    assert not (folder / "out" / "bad").exists()


def test_a_local_teacher_for_other_classes_is_refused(script, folder):
    output = launch(script, folder, teacher=f"local-dir:{folder / 'local7'}", ends=1)
    assert "the teacher's weights are for 7 classes, the student has 5: its new head would be random" in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "found no file"),
        ("import torch\n", "must be timm's train.py, but it lacks"),
        ("def main(:\n", "it is not Python"),
        (
            "parser = 1\ndef main(): ...\ndef _parse_args(): ...\ndef train_one_epoch(): ...\n",
            "DiSK needs the train.py of timm >= 1.0.27, got ",
        ),
    ],
)
def test_what_is_no_train_py_is_refused_unrun(folder, tmp_path, text, message):
    path = tmp_path / "train.py"
    if text is not None:
        path.write_text(text + "raise SystemExit('it was run')\n" if "(:" not in text else text)
    assert message in launch(str(path), folder, ends=1)


def test_the_version_beside_an_old_script_is_named(folder, tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("__version__ = '1.0.20'\n")
    (tmp_path / "train.py").write_text(STANDIN.read_text())
    output = launch(str(tmp_path / "train.py"), folder, ends=1)
    assert re.search(r"error: .*needs timm >= 1\.0\.27.*got 1\.0\.20 .*pip install", output)


def test_help_needs_no_script_and_names_every_argument(script, folder):
    for words in ([], [script]):
        run = [sys.executable, "-m", "disk_plugin.integrations.timm", *words, "--help"]
        text = subprocess.run(run, capture_output=True, text=True, check=True, cwd=folder).stdout
        for flag in (
            "--disk-top-k",
            "--disk-multiplier",
            "--disk-guide-norm",
            "--disk-uniform",
            "--disk-guide-lr",
            "--disk-simkd-factor",
        ):
            assert flag in text


@pytest.mark.parametrize(
    "name", ["r50_r18", "vitl_vitti", "vitl_deitti", "cifd_r34_r18", "cifd_r50_mobilenetv1", "scalekd_swinl_r50"]
)
def test_a_shipped_preset_holds_settings_that_exist(name, folder):
    from disk_plugin.integrations.timm import flags

    path = Path(flags.__file__).parent / "configs" / "imagenet" / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text())
    disk = {key for key in settings if key.startswith("disk_")}
    assert disk <= flags.names()
    assert {"model", "kd_model_name", "epochs"} <= settings.keys()
    assert all("#" in line for line in path.read_text().splitlines() if line.startswith("disk_"))


@needs_real
@pytest.mark.parametrize(
    "name", ["r50_r18", "vitl_vitti", "vitl_deitti", "cifd_r34_r18", "cifd_r50_mobilenetv1", "scalekd_swinl_r50"]
)
def test_the_real_script_knows_every_setting_of_a_shipped_preset(name, folder):
    import ast

    tree = ast.parse(Path(REAL).read_text())
    flags = {
        argument.value.removeprefix("--").replace("-", "_")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    from disk_plugin.integrations.timm import flags as disk

    path = Path(disk.__file__).parent / "configs" / "imagenet" / f"{name}.yaml"
    assert set(yaml.safe_load(path.read_text())) <= flags | disk.names()


@needs_real
@pytest.mark.parametrize(
    "words",
    [
        ["--model-ema", "--amp", "--amp-dtype", "bfloat16", "--grad-accum-steps", 2],
        ["--mixup", 0.5, "--cutmix", 0.5, "--clip-grad", 1.0, "--layer-decay", 0.8],
        ["--no-prefetcher", "--mixup", 0.5, "--channels-last", "--disk-mode", "alternating", "--disk-guide-passes", 1],
        ["--model-dtype", "bfloat16", "--smoothing", 0.0],
        ["--torchcompile", "aot_eager", "--model-ema"],
        ["--disk-student-temperature", "fit", "--disk-rule", "adaptive", "--clip-grad", 0.02, "--clip-mode", "agc"],
        ["--recovery-interval", 2, "--warmup-epochs", 1, "--warmup-prefix", "--cooldown-epochs", 1],
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_hosts_features_work(folder, words, processes):
    name = f"host{processes}{abs(hash(tuple(map(str, words))))}"
    output = launch(REAL, folder, "--experiment", name, "--model", "test_efficientnet", *words, processes=processes)
    assert re.search(r"DiSK: 1 multiplier: .*usage: \d", output)
    assert "nan" not in re.search(r"DiSK: 1 .*", output)[0].split("guide_right")[0]


@needs_real
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_every_start_method_of_the_loaders_works(folder, method):
    code = (
        f"import multiprocessing as m; m.set_start_method({method!r}); import sys; "
        "from disk_plugin.integrations.timm.__main__ import main; main(sys.argv[1:])"
    )
    path = folder / f"start_{method}.py"
    path.write_text(f"if __name__ == '__main__':\n    {code}\n")
    words = command(REAL, folder, ["--experiment", method, "--epochs", 1])[2:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(path), *words], check=True, capture_output=True, env=environment)
