"""The mdistiller adapter, against a stand-in always and a real checkout where ``DISK_MDISTILLER`` names one.

Every run goes through the launcher's ``main`` and the checkout's own ``tools/train.py``, as a user's would.
"""

import copy
import hashlib
import importlib
import os
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("yacs")

from disk_plugin.training import guide_passes  # noqa: E402

# a few steps at the smallest multiplier let momentum carry g near 1 on all of 24 random images, of which the teacher
# knows nothing: no matter here
pytestmark = pytest.mark.filterwarnings("ignore:the guide is dead", "ignore:the teacher is right on")

STANDIN = Path(__file__).parent / "standins" / "mdistiller"
REAL = os.environ.get("DISK_MDISTILLER")
NAMES = {
    "stand-in": {"teacher": "teacher", "student": "student", "normed": "normed", "unusable": "unusable"}
    | {"staged": ("staged_teacher", "staged_student")},
    "checkout": {"teacher": "resnet14", "student": "resnet8", "normed": "wrn_16_1", "unusable": "ShuffleV2"}
    | {"staged": ("resnet14", "resnet8")},
}
CFG = {"stand-in": "configs/kd.yaml", "checkout": "configs/cifar100/kd.yaml"}
# the schedule spans more epochs than are run, so that multiplier and budget differ from epoch to epoch
MOVING = ["DISK.DUAL.EPOCHS", "6", "DISK.DUAL.PERIOD", "6", "DISK.DUAL.BUDGET", "[0.5, 0.1]"]


def purge():
    for name in list(sys.modules):
        if name.split(".")[0] == "mdistiller" or name.startswith("disk_plugin.integrations.mdistiller"):
            del sys.modules[name]


@pytest.fixture(params=["stand-in", "checkout"])
def host(request, tmp_path, monkeypatch):
    """A checkout, a teacher with trained-looking statistics, random images; everything global put back afterwards."""
    if request.param == "checkout" and not REAL:
        pytest.skip("DISK_MDISTILLER does not name a checkout of mdistiller")
    root = STANDIN if request.param == "stand-in" else Path(REAL)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cuda)
    monkeypatch.setattr(nn.Module, "cuda", nn.Module.cuda)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    for name in ("train_list", "test_list", "meta"):
        dataset = torchvision.datasets.CIFAR100
        monkeypatch.setattr(dataset, name, copy.deepcopy(getattr(dataset, name)))
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    purge()
    images(tmp_path / "data" / "cifar-100-python")
    space = SimpleNamespace(root=root, folder=tmp_path, cfg=CFG[request.param], **NAMES[request.param])
    yield space
    purge()
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark


def images(folder):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("train", 24), ("test", 8)):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = rng.integers(0, 100, count).tolist()
        (folder / split).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(number) for number in range(100)]}))


def registered(host):
    """Import the checkout and register, as in a script of one's own; return its modules."""
    purge()
    sys.path.insert(0, str(host.root))
    register = importlib.import_module("disk_plugin.integrations.mdistiller").register
    register()
    register()
    names = ("models", "distillers", "engine", "engine.cfg", "engine.trainer", "dataset")
    return SimpleNamespace(**{name.replace(".", "_"): importlib.import_module(f"mdistiller.{name}") for name in names})


def teacher_checkpoint(host, name):
    """Weights of a teacher whose BatchNorms are far from their initial values, in the host's format."""
    path = host.folder / f"{name}.pth"
    if not path.exists():
        torch.manual_seed(5)
        model = registered(host).models.cifar_model_dict[name][0](num_classes=100)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
        torch.save({"model": model.state_dict()}, path)
    return str(path)


def launch(host, *words, distiller="DISK", out="out", teacher=None, epochs=2, seed=1, find=True):
    """Run the launcher in this process, the checkout imported afresh."""
    teacher = teacher or host.teacher
    checkpoint = [] if "--teacher-checkpoint" in words else ["--teacher-checkpoint", teacher_checkpoint(host, teacher)]
    purge()
    main = importlib.import_module("disk_plugin.integrations.mdistiller.__main__").main
    command = ["--host", str(host.root), "--distiller", distiller, "--cfg", host.cfg, "--device", "cpu"]
    command += checkpoint if "--data-root" in words else [*checkpoint, "--data-root", str(host.folder / "data")]
    command += [] if seed is None else ["--seed", str(seed)]
    options = {"DISTILLER.TEACHER": teacher, "DISTILLER.STUDENT": host.student, "SOLVER.BATCH_SIZE": 8}
    options |= {"SOLVER.EPOCHS": epochs, "DATASET.NUM_WORKERS": 0, "SOLVER.LR_DECAY_STAGES": "[1]"}
    for key, value in options.items():
        command += [] if key in words else [key, str(value)]
    main([*command, "LOG.PREFIX", str(host.folder / out), *words])
    return run_folder(host, out) if find else None


def refused(host, *words, **settings):
    """Return the message with which the launcher ends."""
    with pytest.raises(SystemExit) as ended:
        launch(host, *words, **settings)
    return str(ended.value)


def run_folder(host, out="out"):
    (folder,) = (host.folder / out).glob("*/*")
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(left, right, where="checkpoint"):
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert left == right, where


def contents(root):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }


@pytest.mark.parametrize("trainer", ["base", "disk"])
def test_disk_trains_logs_and_leaves_a_student_with_the_hosts_keys_and_the_host_untouched(host, trainer):
    before = contents(host.root)
    folder = launch(host, "SOLVER.TRAINER", trainer, *MOVING)
    assert contents(host.root) == before
    log = (folder / "worklog.txt").read_text()
    names = (
        "logged_loss",
        "ce",
        "distill",
        "divergence",
        "usage",
        "multiplier",
        "budget",
        "guide_wrong",
        "discount_wrong",
    )
    for name in names:
        assert log.count(f"\n{name}: ") == 2, name
    # train_loss is eq. (5) and may be negative
    assert all(float(value) > 0 for value in re.findall(r"\n(?:logged_loss|divergence): (\S+)", log))
    assert "multiplier: 0.10" in log
    assert "budget: 0.50" in log
    # .1 + 49.9 (1 - cos(pi / 6)) / 2 in the second epoch; the first three are one outer iteration of Algorithm 1
    assert ("multiplier: 3.44" in log) == (trainer == "base")
    plain = registered(host).models.cifar_model_dict[host.student][0](num_classes=100)
    assert load(folder / "student_best")["model"].keys() == plain.state_dict().keys()
    state = load(folder / "latest")["model"]
    assert state["module._extra_state"]["dual"]["epoch"] == (2 if trainer == "base" else 0)
    assert ("guide_optimizer" in state["module._extra_state"]) == (trainer == "disk")
    from disk_plugin import GuideHead

    torch.manual_seed(1)  # any guide: no weight of a trained one is left where it began
    fresh = GuideHead(100, state["module.disk.guide.mlp.0.weight"].shape[1] - 100).state_dict()
    assert all(not torch.equal(value, state[f"module.disk.guide.{name}"]) for name, value in fresh.items())


@pytest.mark.parametrize(
    ("distiller", "trainer", "replay"),
    [
        ("DISK", "base", False),
        ("DISK", "disk", False),
        ("DISK", "disk", True),
        ("SIMKD", "base", False),
        ("DISK_SIMKD", "base", False),
        ("DISK_SIMKD", "disk", False),
        ("KD", "base", False),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(host, distiller, trainer, replay):
    words = ["SOLVER.TRAINER", trainer, *MOVING, "DISK.ALTERNATING.STUDENT_PASSES", "1" if replay else "2"]
    words += ["DISK.ALTERNATING.REPLAY", str(replay)]
    words += ["DISK.ALTERNATING.GUIDE_PASSES", "1", "DISK.STUDENT_TEMPERATURE", "fit", "DATASET.NUM_WORKERS", "1"]
    whole = launch(host, *words, distiller=distiller, out="whole", epochs=3)
    launch(host, *words, distiller=distiller, out="parts", epochs=2)
    parts = launch(host, *words, "--resume", distiller=distiller, out="parts", epochs=3)
    assert whole.name == parts.name
    assert_same(load(whole / "latest"), load(parts / "latest"))


def test_disk_simkd_with_uniform_weights_equals_simkd_bit_for_bit(host):
    states = []
    for distiller in ("SIMKD", "DISK_SIMKD"):
        folder = launch(host, "DISK_SIMKD.WEIGHT", "uniform", distiller=distiller, out=distiller)
        states.append(load(folder / "simkd_latest")["model"])
    assert_same(*states)
    weighted = launch(host, distiller="DISK_SIMKD", out="weighted")
    assert any(
        not torch.equal(value, states[0][name]) for name, value in load(weighted / "simkd_latest")["model"].items()
    )


@pytest.mark.parametrize("distiller", ["DISK", "DISK_SIMKD", "KD"])
def test_evaluation_repeats_the_accuracy_of_training_without_the_teacher(host, distiller, capsys):
    words = ["SOLVER.LR", "0.001"]
    folder = launch(host, *words, distiller=distiller)
    logged = [line for line in (folder / "worklog.txt").read_text().splitlines() if line.startswith("test_loss")][-1]
    expected = pytest.approx(float(logged.split()[1]), abs=0.0051)  # the host logs two decimals
    capsys.readouterr()
    launch(host, *words, "--evaluate", "latest", distiller=distiller)
    assert printed_loss(capsys) == expected
    name = "simkd_latest" if "SIMKD" in distiller else "student_latest"
    moved = (folder / name).rename(host.folder / "alone")
    launch(host, "--evaluate", str(moved), "--teacher-checkpoint", "/nowhere", distiller=distiller)
    assert printed_loss(capsys) == expected


def printed_loss(capsys):
    return float(capsys.readouterr().out.rsplit("cross-entropy ", 1)[1])


def test_a_whole_checkpoint_evaluates_as_its_student_and_simkd_without_its_projector_is_refused(host):
    folder = launch(host, distiller="DISK_SIMKD")
    assert "simkd_best" in refused(host, "--evaluate", str(folder / "student_best"), distiller="DISK_SIMKD")
    assert "simkd_best" in refused(host, "--evaluate", str(folder / "student_best"), distiller="KD")
    folder = launch(host, distiller="DISK", out="disk")
    launch(host, "--evaluate", str(folder / "latest"))


def test_a_warm_start_is_where_the_student_begins_whatever_the_distiller(host):
    first = launch(host, distiller="KD", out="first")
    for distiller in ("KD", "DISK"):
        folder = launch(
            host,
            "DISTILLER.WARM_START",
            str(first / "student_latest"),
            "SOLVER.LR",
            "1e-12",
            distiller=distiller,
            out=distiller,
        )
        weights, begun = load(first / "student_latest")["model"], load(folder / "student_latest")["model"]
        for name, value in weights.items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(begun[name], value, rtol=0, atol=1e-6)


def test_a_bare_state_dict_and_one_from_data_parallel_serve_as_teacher(host):
    weights = torch.load(teacher_checkpoint(host, host.teacher), weights_only=True)["model"]
    for number, content in enumerate((weights, {"state_dict": {f"module.{k}": v for k, v in weights.items()}})):
        path = host.folder / f"teacher{number}.pth"
        torch.save(content, path)
        folder = launch(host, "--teacher-checkpoint", str(path), out=f"out{number}", epochs=1)
        state = load(folder / "latest")["model"]
        assert all(torch.equal(value, state[f"module.teacher.{name}"]) for name, value in weights.items())


def test_the_experiments_folder_is_stable_and_told_apart_by_what_defines_the_run(host):
    folder = launch(host, epochs=1)
    message = refused(host, epochs=3)
    assert str(folder) in message
    assert "--resume" in message
    assert "--overwrite" in message
    (folder / "mark").touch()
    assert launch(host, "DATASET.NUM_WORKERS", "1", "--overwrite", epochs=1) == folder
    assert not (folder / "mark").exists()
    message = refused(host, "--resume", "DISK.BUDGET", "1", "--allow-changed-settings")
    assert "DISK.BUDGET: None then, 1 now" in message
    assert "what bounds g: discount then, budget now" in message
    assert "what bounds g cannot change within a run" in message
    message = refused(host, "--resume", "DISK.TEMPERATURE", "1")
    assert "DISK.TEMPERATURE: 2.0 then, 1.0 now" in message
    assert "--allow-changed-settings" in message
    launch(host, "--resume", "DISK.TEMPERATURE", "1", "--allow-changed-settings", find=False)
    (copied,) = set(folder.parent.iterdir()) - {folder}
    assert load(copied / "latest")["epoch"] == 2
    launch(host, "--resume", "DISK.TEMPERATURE", "1", epochs=3, find=False)
    assert load(copied / "latest")["epoch"] == 3
    launch(host, "DISK.TEMPERATURE", "3", out="out", epochs=1, find=False)
    assert len(list((host.folder / "out").glob("*/*"))) == 3
    assert load(folder / "latest")["epoch"] == 1


def test_a_run_from_before_there_was_a_replay_goes_on(host):
    folder = launch(host, "SOLVER.TRAINER", "disk", epochs=1)
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    older = {key: value for key, value in settings.items() if "REPLAY" not in key}
    assert len(older) == len(settings) - 2
    (folder / "settings.yaml").write_text(yaml.safe_dump(older))
    moved = folder.rename(folder.with_name(f"{folder.name.rpartition('-')[0]}-0123abcd"))
    message = refused(host, "SOLVER.TRAINER", "disk", "DISK.ALTERNATING.REPLAY", "True", "--resume", epochs=2)
    assert "DISK.ALTERNATING.REPLAY: False then, True now" in message
    assert launch(host, "SOLVER.TRAINER", "disk", "--resume", epochs=2) == folder
    assert not moved.exists()
    assert load(folder / "latest")["epoch"] == 2


def test_changed_settings_that_are_allowed_take_effect_and_lasting_ones_are_refused(host):
    words = ["SOLVER.TRAINER", "disk"]
    words += ["DISK.BUDGET", "0.3"]
    original = launch(host, *words, epochs=1)
    changed = [
        "SOLVER.LR",
        "0.001",
        "SOLVER.WEIGHT_DECAY",
        "0.125",
        "SOLVER.LR_DECAY_STAGES",
        "[9]",
        "DISK.BUDGET",
        "0.75",
    ]
    changed += ["DISK.ALTERNATING.WEIGHT_DECAY", "0.25"]
    launch(host, *words, *changed, "--resume", "--allow-changed-settings", find=False)
    (folder,) = set(original.parent.iterdir()) - {original}
    state = load(folder / "latest")
    assert [state["optimizer"]["param_groups"][0][name] for name in ("lr", "weight_decay")] == [0.001, 0.125]
    assert state["model"]["module._extra_state"]["guide_optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    assert state["model"]["module.disk.budget"] == 0.75
    assert "budget: 0.75" in (folder / "worklog.txt").read_text()
    for key, value in (
        ("DISK.ALTERNATING.OPTIMIZER", "Adam"),
        ("SOLVER.TRAINER", "base"),
        ("DISK.GUIDE.NORM", "batch"),
        ("DISK.ALTERNATING.REPLAY_CAPACITY", "3"),  # the record in the checkpoint is of the other size
    ):
        message = refused(host, *words, *changed, key, value, "--resume", "--allow-changed-settings")
        assert f"{key} cannot change within a run" in message
    other = host.folder / "other.pth"
    weights = torch.load(teacher_checkpoint(host, host.teacher), weights_only=True)["model"]
    torch.save({name: value + 1 for name, value in weights.items()}, other)
    message = refused(
        host, *words, *changed, "--resume", "--teacher-checkpoint", str(other), "--allow-changed-settings"
    )
    assert "teacher weights cannot change within a run" in message


def test_an_overwritten_run_comes_back_if_the_new_one_fails_before_its_first_checkpoint(host, capsys):
    folder = launch(host, epochs=1)
    (folder / "mark").touch()
    message = refused(host, "SOLVER.LR_DECAY_STAGES", "[1]", "SOLVER.MOMENTUM", "-1.0", out="other")
    assert "the host's tools/train.py ended before any training, by ValueError: Invalid momentum value: -1.0" in message
    assert not list((host.folder / "other").glob("*/*"))  # the optimizer is the trainer's: the folder is gone again
    broken = host.folder / "broken.py"
    broken.write_text(f"{(host.root / 'tools' / 'train.py').read_text()}".replace("trainer_dict[", "missing_dict["))
    assert "by NameError: name 'missing_dict'" in refused(host, "--script", str(broken), "--overwrite", epochs=1)
    assert f"the new run came to no checkpoint: {folder} holds the earlier one again" in capsys.readouterr().out
    assert launch(host, "--resume", epochs=2) == folder
    assert (folder / "mark").exists()
    launch(host, "--overwrite", epochs=1)
    assert [path for path in folder.parent.iterdir() if path != folder] == []
    assert not (folder / "mark").exists()


def test_a_run_too_short_for_its_multiplier_to_rise_says_so(host, capsys):
    launch(host, "DISK.BUDGET", "0.3", epochs=2)
    assert "in the 2 steps of its schedule the multiplier comes to at most 0.1 of 50" in capsys.readouterr().out
    launch(host, "DISK.DUAL.MULTIPLIER", "[50, 50]", "--overwrite", epochs=2, out="constant")
    assert "comes to at most" not in capsys.readouterr().out


def test_the_seed_may_stand_in_the_configuration_and_crd_finds_its_trainer(host):
    settings = importlib.import_module("disk_plugin.integrations.mdistiller.settings") if registered(host) else None
    path = host.root / host.cfg
    assert settings.merge(path, ["SOLVER.SEED", "3"], distiller="CRD", seed=None).SOLVER.TRAINER == "crd"
    assert settings.merge(path, ["SOLVER.SEED", "3"], distiller="KD", seed=4).SOLVER.SEED == 4
    states = []
    for out in ("a", "b"):
        folder = launch(host, "SOLVER.SEED", "3", distiller="KD", out=out, epochs=1, seed=None)
        states.append(load(folder / "latest"))
    assert_same(*states)


def test_a_pair_whose_classifier_cannot_be_reused_is_refused_with_the_reason(host):
    message = refused(host, distiller="SIMKD", teacher=host.unusable)
    assert f"cannot reuse the classifier of teacher {host.unusable}" in message
    assert not (host.folder / "out").exists()


def test_the_map_of_a_network_that_normalises_before_pooling_gives_its_logits(host):
    modules = registered(host)
    cfg = configured(host, modules, "SIMKD", teacher=host.normed)
    teacher, student = models(host, modules, host.normed)
    distiller = modules.distillers.distiller_dict["SIMKD"](student, teacher.eval(), cfg)
    logits, features = teacher(torch.randn(4, 3, 32, 32))
    torch.testing.assert_close(
        distiller.simkd.classifier(distiller.teacher_map(features)), logits, rtol=1e-4, atol=1e-4
    )


def test_every_model_serves_simkd_as_student_and_as_teacher_if_its_classifier_reads_its_last_map(host):
    modules = registered(host)
    image, known = torch.randn(2, 3, 32, 32), modules.models.cifar_model_dict
    for teacher, student in [(name, host.student) for name in known] + [(host.teacher, name) for name in known]:
        cfg = configured(host, modules, "SIMKD", "DISTILLER.STUDENT", student, teacher=teacher)
        pair = [known[name][0](num_classes=100) for name in (student, teacher)]
        if teacher in ("unusable", "MobileNetV2", "ShuffleV2"):
            with pytest.raises(ValueError, match=f"classifier of teacher {teacher}, student {student}: "):
                modules.distillers.distiller_dict["SIMKD"](*pair, cfg)
            continue
        distiller = modules.distillers.distiller_dict["SIMKD"](*pair, cfg).eval()
        with torch.no_grad():
            logits, losses = distiller.forward_train(image, torch.zeros(2, dtype=torch.long))
            assert torch.equal(logits, distiller(image=image))
        assert logits.shape == (2, 100)
        assert torch.isfinite(losses["loss_feature"]).all()


BAD = [
    (["--host", "/nowhere"], {}, "--host must name a checkout of mdistiller, which contains tools/train.py"),
    (["--host", "/nowhere"], {}, "git clone https://github.com/megvii-research/mdistiller"),
    (["--cfg", "none.yaml"], {}, "--cfg must name a YAML file, found none at none.yaml"),
    ([], {"distiller": "DISC"}, "DISK, DISK_CIFD, DISK_DKD, DISK_SCALEKD, DISK_SIMKD, "),
    (["DISK.LAMBDA", "1"], {}, "DISK.LAMBDA; known in DISK: ALTERNATING, BUDGET, CE_WEIGHT"),
    (["DISK.DUAL.LAMBDA", "1"], {}, "known in DISK.DUAL: ASCENT_RATE, BUDGET"),
    (["DISK.CE_WEIGHT", "much"], {}, "DISK.CE_WEIGHT must be a number such as 0.0, got much"),
    (
        ["DISK.DUAL.MULTIPLIER", "50"],
        {},
        "DISK.DUAL.MULTIPLIER must be two numbers such as [0.1, 50.0], got 50: '[50, 50]' keeps it constant",
    ),
    (["DISK.DUAL.MULTIPLIER", "high"], {}, "DISK.DUAL.MULTIPLIER must be two numbers such as [0.1, 50.0], got high"),
    (["DISK.GUIDE.HIDDEN_DIMS", "64"], {}, "must be a list such as [64, 128], got 64: '[64]' makes it one"),
    (["SOLVER.LR_DECAY_STAGES", "150"], {}, "SOLVER.LR_DECAY_STAGES must be a list such as ["),
    (["KD.TEMPERATURE", "2.5"], {}, "KD.TEMPERATURE must be a whole number such as "),
    (["EXPERIMENT.NAME", "3"], {}, """EXPERIMENT.NAME must be a word, got 3: '"3"' makes it one"""),
    (["DISK.GUIDE", "64"], {}, "DISK.GUIDE must name a key, not a section; known in DISK.GUIDE: HIDDEN_DIMS, "),
    (["DISK.CE_WEIGHT"], {}, "options must be pairs KEY VALUE"),
    (["DISK.VARIANT", "imagenet"], {}, "variant must be one of"),
    (["DISK.DISCOUNT", "much"], {}, "discount must be one of ['auto'], got 'much'"),
    (["DISK.DISCOUNT", "1.5"], {}, "discount must be <= 0.99, got 1.5"),
    (["DISK.DISCOUNT", "0.4", "DISK.BUDGET", "0.1"], {}, "discount=0.4 and budget=0.1 both bound g"),
    (["DISK.DISCOUNT", "0.4", "DISK.DUAL.PERIOD", "2"], {}, "the loss was given discount=0.4, which has no period"),
    (["DISK.TOP_K", "five"], {}, "top_k must be an int, got str 'five'"),
    (
        ["DATASET.TYPE", "cifar10"],
        {},
        "--data-root cannot redirect DATASET.TYPE 'cifar10': mdistiller/dataset (cifar100",
    ),
    (["--logit-stand"], {}, "error: unknown --logit-stand: --help lists the flags; what a flag of the checkout's own"),
    (["--script", "tools/none.py"], {}, "which contains tools/none.py, mdistiller/distillers/__init__.py"),
    (["DISK.DUAL.RULE", "linear"], {}, "rule must be one of"),
    (["DISTILLER.STUDENT", "nobody"], {}, "DISTILLER.STUDENT must be one of"),
    (["SOLVER.TRAINER", "disc"], {}, "SOLVER.TRAINER must be one of base, "),
    (["SOLVER.TRAINER", "disk"], {"distiller": "KD"}, "SOLVER.TRAINER disk needs DISTILLER.TYPE DISK or DISK_SIMKD"),
    (["SOLVER.TRAINER", "disk", "DISK.ALTERNATING.GUIDE_PASSES", "0"], {}, "GUIDE_PASSES must be >= 1, got 0"),
    (
        ["--teacher-checkpoint", "/nowhere"],
        {},
        "--teacher-checkpoint must name a checkpoint file, found none at /nowhere",
    ),
    (["DISTILLER.WARM_START", "/nowhere"], {}, "DISTILLER.WARM_START must name a checkpoint file"),
    (["--data-root", "/nowhere"], {}, "--data-root must hold cifar100, found no /nowhere/cifar-100-python/train"),
    (["--resume"], {}, "--resume needs an earlier run with a checkpoint 'latest' in "),
    (["--resume", "--overwrite"], {}, "give one of them"),
    (["--overwrite", "--evaluate", "best"], {}, "give one of them"),
    (["SOLVER.SEED", "abc"], {"seed": None}, "SOLVER.SEED must be an int, got 'abc'"),
    (["SOLVER.LR.X", "1"], {}, "SOLVER.LR.X must name keys"),
    (["SOLVER.TRAINER", "crd"], {"distiller": "KD"}, "SOLVER.TRAINER "),
    ([], {"distiller": "NONE"}, "--teacher-checkpoint needs a distiller with a teacher, got NONE"),
    (["LOG.WANDB", "True"], {}, "pip install wandb"),
    (["--evaluate", "/nowhere"], {}, "--evaluate must name a checkpoint file"),
    (["--evaluate", "best"], {}, "--evaluate needs an earlier run"),
]


@pytest.mark.parametrize(("words", "settings", "message"), BAD)
def test_bad_input_ends_with_what_was_expected_and_what_came(host, words, settings, message):
    assert message in refused(host, *words, **settings)
    assert not (host.folder / "out").exists()


def test_a_value_of_another_type_in_a_file_is_refused_with_its_cure_and_the_cure_works(host):
    path = host.folder / "odd.yaml"
    path.write_text("DISK:\n  DUAL:\n    MULTIPLIER: 50\n")
    expected = "DISK.DUAL.MULTIPLIER must be two numbers such as [0.1, 50.0], got 50: '[50, 50]' keeps it constant"
    assert expected in refused(host, "--cfg", str(path))
    words = ["DISK.DUAL.MULTIPLIER", "[50, 50]", "DISK.GUIDE.HIDDEN_DIMS", "[64]", "DISK.BUDGET", "1"]
    state = load(launch(host, *words, epochs=1) / "latest")["model"]
    assert state["module.disk.multiplier"] == 50
    assert state["module.disk.budget"] == 1


def test_a_number_in_place_of_a_word_reaches_the_hosts_script_as_the_word_that_it_is(host):
    folder = launch(host, "DISK.DISCOUNT", "0.4", "EXPERIMENT.TAG", "'1,2'", epochs=1)
    assert folder.name.startswith("1,2-")
    assert load(folder / "latest")["model"]["module.disk.level.log_guide"] != 0


@pytest.mark.parametrize("content", ["[1, 2]", "1: 2", "SOLVER:\n  1: 2"])
def test_a_configuration_file_without_named_sections_is_refused(host, content):
    path = host.folder / "odd.yaml"
    path.write_text(content)
    message = refused(host, "--cfg", str(path))
    assert "--cfg" in message
    assert str(path) in message


def test_a_teacher_of_another_architecture_is_refused(host):
    other = teacher_checkpoint(host, host.unusable)
    message = refused(host, "--teacher-checkpoint", other)
    assert f"{other} is not of the teacher {host.teacher}'s architecture" in message


def test_a_checkpoint_that_holds_objects_needs_trust(host):
    path = host.folder / "objects.pth"
    weights = torch.load(teacher_checkpoint(host, host.teacher), weights_only=True)["model"]
    torch.save({"model": weights, "accuracy": np.float64(70.0), "arguments": SimpleNamespace(lr=0.1)}, path)
    assert "--trust-checkpoint" in refused(host, "--teacher-checkpoint", str(path))
    launch(host, "--teacher-checkpoint", str(path), "--trust-checkpoint", epochs=1)


@pytest.mark.parametrize("content", [b"text", b"", pickle.dumps(3)[:-1]])
def test_a_file_that_is_no_checkpoint_is_refused(host, content):
    path = host.folder / "broken.pth"
    path.write_bytes(content)
    message = refused(host, "--teacher-checkpoint", str(path))
    assert f"must be a checkpoint written by torch.save, got {path}" in message
    assert "--trust" not in message


def test_an_interrupted_write_leaves_the_old_checkpoint(host, tmp_path):
    modules = registered(host)
    path = tmp_path / "latest"
    modules.engine_trainer.save_checkpoint({"epoch": 1}, str(path))
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        modules.engine_trainer.save_checkpoint({"epoch": 2, "unpicklable": lambda: None}, str(path))
    assert load(path) == {"epoch": 1}


# the distillers and trainers themselves, as a script of one's own uses them


def configured(host, modules, kind, *words, teacher=None):
    cfg = modules.engine_cfg.CFG.clone()
    options = ["DISTILLER.TYPE", kind, "DISTILLER.TEACHER", teacher or host.teacher, "DISTILLER.STUDENT", host.student]
    cfg.merge_from_list([*options, "LOG.PREFIX", str(host.folder / "own"), "LOG.WANDB", False, *words])
    return cfg


def models(host, modules, name=None):
    name = name or host.teacher
    path = teacher_checkpoint(host, name)
    teacher = modules.models.cifar_model_dict[name][0](num_classes=100)
    teacher.load_state_dict(torch.load(path, weights_only=True)["model"])
    return teacher, modules.models.cifar_model_dict[host.student][0](num_classes=100)


def distiller_of(host, kind="DISK", *words):
    checkpoint = teacher_checkpoint(host, host.teacher)
    assert checkpoint
    modules = registered(host)
    cfg = configured(host, modules, kind, *words)
    teacher, student = models(host, modules)
    return modules, cfg, modules.distillers.distiller_dict[kind](student, teacher, cfg).train()


def replica_of(module):
    """A replica as DataParallel makes it: no Parameters, buffers that are copies, children wired to replicas."""
    replica = module._replicate_for_data_parallel()
    for name, value in module._parameters.items():
        setattr(replica, name, None if value is None else value.clone())
    for name, value in module._buffers.items():
        replica._buffers[name] = None if value is None else value.clone()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    return replica


def image_batch(samples=8):
    return torch.randn(samples, 3, 32, 32), torch.arange(samples)


@pytest.mark.parametrize("kind", ["DISK", "SIMKD", "DISK_SIMKD"])
@pytest.mark.parametrize("budget", ["0.0", "1000.0"])
def test_losses_are_per_sample_vectors_that_replicas_give_alike_and_forward_changes_nothing(host, kind, budget):
    _, _, distiller = distiller_of(host, kind, "DISK.BUDGET", budget)
    for part in (distiller.student, getattr(distiller, "simkd", distiller.student)):
        part.eval()  # no batch statistics: they are each replica's own, with or without us
    before = copy.deepcopy(distiller.state_dict())
    image, target = image_batch()
    expected_logits, expected = replica_of(distiller)(image=image, target=target, epoch=3)
    outputs = [
        replica_of(distiller)(image=x, target=y, epoch=3) for x, y in zip(image.chunk(4), target.chunk(4), strict=True)
    ]
    assert_same(distiller.state_dict(), before)
    torch.testing.assert_close(torch.cat([logits for logits, _ in outputs]), expected_logits)
    for name, value in expected.items():
        assert value.shape == (8,)
        torch.testing.assert_close(torch.cat([losses[name] for _, losses in outputs]), value, rtol=1e-4, atol=1e-4)
    sum(losses[name].sum() for _, losses in outputs for name in losses).backward()
    assert any(p.grad is not None and p.grad.any() for p in distiller.student.parameters())


def test_a_replica_of_one_sample_trains(host):
    _, _, distiller = distiller_of(host)
    image, target = image_batch(1)
    distiller.student.eval()
    _, losses = replica_of(distiller)(image=image, target=target, epoch=1)
    assert torch.isfinite(losses["loss_disk"]).all()


def test_with_the_stock_trainer_multiplier_and_budget_follow_the_epoch(host):
    _, _, distiller = distiller_of(host, "DISK", *MOVING)
    image, target = image_batch()
    for epoch in (1, 3):
        distiller(image=image, target=target, epoch=epoch)
        assert (distiller.disk.multiplier.item(), distiller.disk.budget.item()) == distiller.dual(epoch - 1)


def test_a_schedule_that_learns_from_the_run_refuses_a_trainer_that_never_ends_an_epoch(host):
    _, _, distiller = distiller_of(host, "DISK", "DISK.DUAL.RULE", "ascent")
    image, target = image_batch()
    with pytest.raises(RuntimeError, match="RULE ascent learns from each epoch and so needs a trainer out of trainer_"):
        distiller(image=image, target=target, epoch=1)


class Split(nn.Module):
    """DataParallel with two replicas, on the CPU."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, image, target=None, epoch=None):
        parts = zip(image.chunk(2), target.chunk(2), strict=True)
        logits, inputs = zip(*[replica_of(self.module)(image=x, target=y, epoch=epoch) for x, y in parts], strict=True)
        return torch.cat(logits), {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}


def test_a_registered_trainer_applies_one_hinge_to_the_batch_gathered_from_all_replicas(host):
    modules, cfg, distiller = distiller_of(host)
    image, target = image_batch()
    distiller.student.eval()
    with torch.no_grad():
        target[:4] = distiller.student(image[:4])[0].argmax(1)  # half of the batch spends less than the other
    terms = distiller.terms(*gathered(distiller, image, target), epoch=1)
    usage = terms.disk.usage
    halves = usage[:4].mean(), usage[4:].mean()
    distiller.disk.budget.fill_(0.0)
    cfg.DISK.DUAL.BUDGET = float(usage.mean() * 0.999)
    assert min(halves) < cfg.DISK.DUAL.BUDGET < max(halves)
    losses = []
    for wrapper in (Split, torch.nn.DataParallel):
        fresh = type(distiller)(distiller.student, distiller.teacher, cfg)
        fresh.disk.guide.load_state_dict(distiller.disk.guide.state_dict())
        wrapped = wrapper(fresh)
        modules.engine.trainer_dict["base"]("own", wrapped, [], [], cfg)
        wrapped.train()
        fresh.student.eval()
        losses.append(wrapped(image=image, target=target, epoch=1)[1]["loss_disk"].mean())
    torch.testing.assert_close(*losses)


def gathered(distiller, image, target):
    logits, inputs = distiller.outputs(image, target)
    return logits, target, inputs


@pytest.mark.parametrize("variant", ["paper", "official_cifar", "official_imagenet"])
@pytest.mark.parametrize("kind", ["DISK", "DISK_SIMKD"])
def test_every_variant_trains_student_and_guide(host, kind, variant):
    _, _, distiller = distiller_of(host, kind, "DISK.VARIANT", variant, "DISK.TOP_K", 5)
    image, target = image_batch()
    logits, losses = distiller(image=image, target=target, epoch=1)
    assert logits.shape == (8, 100)
    losses["loss_disk"].mean().backward()
    for part in (distiller.student, distiller.disk):
        assert all(torch.isfinite(p.grad).all() for p in part.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert not any(p.grad is not None for p in distiller.teacher.parameters())


@pytest.mark.parametrize("trainer", ["base", "disk"])
def test_a_guide_in_the_students_step_is_in_training_mode_and_one_outside_is_not(host, trainer):
    _, _, distiller = distiller_of(host, "DISK", "SOLVER.TRAINER", trainer)
    assert distiller.student.training
    assert distiller.disk.guide.training == (trainer == "base")


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_algorithm_1_alternates_and_each_pass_leaves_the_other_player_alone(host, norm, monkeypatch):
    words = ["SOLVER.TRAINER", "disk", "SOLVER.EPOCHS", 3, "DISK.ALTERNATING.STUDENT_PASSES", 2]
    words += ["DISK.GUIDE.NORM", norm]
    words += [
        "DISK.ALTERNATING.GUIDE_PASSES",
        1,
        "DISK.ALTERNATING.GUIDE_WARMUP_EPOCHS",
        2,
        "SOLVER.LR_DECAY_STAGES",
        [2],
    ]
    modules, cfg, distiller = distiller_of(host, "DISK", *words)
    image, target = image_batch()
    loader = [(image, target, torch.arange(8))] * 2
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    trainer = modules.engine.trainer_dict["disk"](
        "own", torch.nn.DataParallel(distiller), loader, [(image, target)], cfg
    )
    seen = []

    def snapshot():
        return copy.deepcopy(distiller.student.state_dict()), copy.deepcopy(distiller.disk.guide.state_dict())

    guide_pass, train_iter = guide_passes.guide_pass, trainer.train_iter

    def watched_guide_pass(*arguments):
        student, guide = snapshot()
        assert distiller.disk.guide.training
        guide_pass(*arguments)
        assert distiller.disk.guide.training
        assert_same(distiller.student.state_dict(), student)
        assert any(not torch.equal(value, distiller.disk.guide.state_dict()[name]) for name, value in guide.items())
        seen.append(f"g{trainer.core.schedule.epoch + 1}")

    def watched_train_iter(data, epoch, meters):
        student, guide = snapshot()
        message = train_iter(data, epoch, meters)
        assert_same(distiller.disk.guide.state_dict(), guide)
        assert any(not torch.equal(value, distiller.student.state_dict()[name]) for name, value in student.items())
        assert distiller.student.training
        seen.append(f"s{epoch}")
        return message

    monkeypatch.setattr(guide_passes, "guide_pass", watched_guide_pass)
    trainer.train_iter = watched_train_iter
    trainer.train()
    assert seen == ["g1", "g1", "g1", "s1", "s1", "s2", "s2", "g3", "s3", "s3"]
    assert trainer.guide_optimizer.param_groups[0]["lr"] == pytest.approx(
        0.1 * 0.1
    )  # the guide's decays with the student's
    assert all(type(group["lr"]) is float for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("kind", ["DISK", "DISK_SIMKD"])
def test_with_a_record_the_first_guide_passes_alone_run_over_the_loader(host, kind, monkeypatch):
    words = ["SOLVER.TRAINER", "disk", "SOLVER.EPOCHS", 6, "DISK.ALTERNATING.STUDENT_PASSES", 2]
    words += ["DISK.ALTERNATING.GUIDE_PASSES", 1, "DISK.ALTERNATING.REPLAY", True, "SOLVER.BATCH_SIZE", 8]
    modules, cfg, distiller = distiller_of(host, kind, *words, *MOVING, "DISK.DUAL.PERIOD", 2)
    image, target = image_batch()
    loader = [(image, target, torch.arange(8))] * 3
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    wrapped = torch.nn.DataParallel(distiller)
    trainer = modules.engine.trainer_dict["disk"]("own", wrapped, loader, [(image, target)], cfg)
    replay = trainer.core.guide_passes.replay
    seen, guide_pass, train_guide = [], guide_passes.guide_pass, replay.train_guide

    def watched_guide_pass(*arguments):
        seen.append(("literal", trainer.core.schedule.epoch + 1))
        guide_pass(*arguments)

    def watched_train_guide(passes):
        student, guide = copy.deepcopy(distiller.student.state_dict()), copy.deepcopy(distiller.disk.guide.state_dict())
        seen.append(("replay", passes, len(replay), distiller.disk.multiplier.item()))
        train_guide(passes)
        assert_same(distiller.student.state_dict(), student)
        assert not any(torch.equal(value, guide[name]) for name, value in distiller.disk.guide.state_dict().items())

    monkeypatch.setattr(guide_passes, "guide_pass", watched_guide_pass)
    replay.train_guide = watched_train_guide
    trainer.train()
    multipliers = [distiller.dual(iteration)[0] for iteration in (1, 2)]  # of the student's passes that follow
    # of two student passes of 24 samples the last is recorded
    assert seen == [("literal", 1), *(("replay", 1, 24, multiplier) for multiplier in multipliers)]
    assert set(distiller.get_extra_state()) == {"dual", "replay"}


def test_the_guide_may_have_adam_and_read_the_logits_alone(host):
    words = ["SOLVER.TRAINER", "disk", "DISK.ALTERNATING.OPTIMIZER", "Adam", "DISK.GUIDE.USE_FEATURES", False]
    modules, cfg, distiller = distiller_of(host, "DISK", *words)
    assert distiller.disk.guide.feature_dim == 0
    trainer = modules.engine.trainer_dict["disk"]("own", torch.nn.DataParallel(distiller), [], [], cfg)
    assert isinstance(trainer.guide_optimizer, torch.optim.Adam)
    cfg.DISK.ALTERNATING.OPTIMIZER = "adam"
    with pytest.raises(ValueError, match="OPTIMIZER must be SGD or Adam, got 'adam'"):
        modules.engine.trainer_dict["disk"]("own", torch.nn.DataParallel(distiller), [], [], cfg)


def test_disk_refuses_a_trainer_that_splits_its_loss(host):
    with pytest.raises(ValueError, match=r"needs SOLVER.TRAINER base or, with a guide, disk .* got 'dot'"):
        distiller_of(host, "DISK", "SOLVER.TRAINER", "dot")


def test_every_argument_of_disk_has_a_key_with_its_default(host):
    import inspect

    from disk_plugin import DiSKLoss

    cfg = registered(host).engine_cfg.CFG
    for name, parameter in inspect.signature(DiSKLoss).parameters.items():
        if name not in ("guide", "multiplier", "weight"):  # a tensor is no value of a configuration
            assert cfg.DISK[name.upper()] == parameter.default
    assert cfg.LOG.WANDB is False


def test_the_shipped_configurations_merge_and_name_models_of_the_host(host):
    modules = registered(host)
    settings = importlib.import_module("disk_plugin.integrations.mdistiller.settings")
    configs = sorted(Path(settings.__file__).parent.glob("configs/**/*.yaml"))
    assert len(configs) >= 8
    for path in configs:
        cfg = settings.merge(path, [], distiller=None, seed=None)
        if host.root != STANDIN:
            known = {"cifar100": modules.models.cifar_model_dict, "imagenet": modules.models.imagenet_model_dict}
            settings.check_names(cfg, known[cfg.DATASET.TYPE])


def test_without_the_host_the_import_error_says_how_to_get_it(monkeypatch):
    purge()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "mdistiller" not in entry])
    register = importlib.import_module("disk_plugin.integrations.mdistiller").register
    with pytest.raises(ImportError, match=r"mdistiller cannot be imported .* put a checkout of https://github.com"):
        register()


def test_help_explains_every_flag(capsys):
    main = importlib.import_module("disk_plugin.integrations.mdistiller.__main__")
    with pytest.raises(SystemExit):
        main.main(["--help"])
    text = capsys.readouterr().out
    for action in main._parser()._actions:
        assert action.help
        assert all(option in text for option in action.option_strings)
