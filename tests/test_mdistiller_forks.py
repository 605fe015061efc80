"""Forks of mdistiller: what they lack or do otherwise is looked up, or refused in one line before a folder is made."""

import shutil
import sys
import textwrap

import pytest
import test_mdistiller as shared
import torch
import yaml
from test_mdistiller import launch, load, refused, run_folder

host = shared.host
pytestmark = shared.pytestmark

STRONG = """

class StrongTrainer(BaseTrainer):
    def train_iter(self, data, epoch, train_meters):
        image, target, _ = data
        logits, losses = self.distiller(image_weak=image, image_strong=image, target=target, epoch=epoch)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        train_meters["losses"].update(0.0, len(target))
        train_meters["top1"].update(accuracy(logits, target)[0][0], len(target))
        return "strong"
"""
MULTI = """
from turtle import st  # as in logit-standardization-KD, which does not use it


class MLKD(KD):
    def forward_train(self, image_weak, image_strong, target, **kwargs):
        return super().forward_train(image_weak, target)

"""
# a fork as logit-standardization-KD is one: file, what is replaced, by what
FORK = [
    ("mdistiller/models/__init__.py", 'tiny_imagenet_model_dict = {"teacher": (maker(), None)}\n', ""),
    (
        "mdistiller/dataset/__init__.py",
        "from . import cifar100, imagenet, tiny_imagenet",
        "from . import cifar100, imagenet",
    ),
    ("mdistiller/dataset/__init__.py", ', "tiny_imagenet"]', "]"),
    ("mdistiller/engine/cfg.py", '"TAG": "default"}', '"TAG": "default", "LOGIT_STAND": False}'),
    ("mdistiller/engine/trainer.py", 'return f"Epoch:{epoch}| Loss:{loss.item():.4f}"\n', None),
    ("mdistiller/engine/__init__.py", "import BaseTrainer", "import BaseTrainer, StrongTrainer"),
    ("mdistiller/engine/__init__.py", '"base": BaseTrainer', '"base": BaseTrainer, "ours": StrongTrainer'),
    ("mdistiller/distillers/__init__.py", "self.temperature = cfg.KD.TEMPERATURE", None),
    ("mdistiller/distillers/__init__.py", "        t = self.temperature\n", None),
    ("mdistiller/distillers/__init__.py", "\ndistiller_dict =", MULTI + "\ndistiller_dict ="),
    ("mdistiller/distillers/__init__.py", '"KD": KD', '"KD": KD, "MLKD": MLKD'),
    ("tools/train.py", '    parser.add_argument("--resume"', None),
]
ADDED = {
    FORK[4]: FORK[4][1] + STRONG,
    FORK[7]: FORK[7][1] + "\n        self.logit_stand = cfg.EXPERIMENT.LOGIT_STAND",
    FORK[8]: "        if self.logit_stand:\n            logits = logits / logits.std(1, keepdim=True)\n" + FORK[8][1],
    FORK[11]: '    parser.add_argument("--logit-stand", action="store_true")\n' + FORK[11][1],
}


def edit(root, *edits):
    for name, old, new in edits:
        path = root / name
        text = path.read_text()
        assert old in text, (name, old)
        path.write_text(text.replace(old, ADDED[name, old, new] if new is None else new))


@pytest.fixture
def fork(host):
    """The stand-in without Tiny-ImageNet, with a key, a distiller and a trainer of its own."""
    if host.root != shared.STANDIN:
        pytest.skip("a fork of the stand-in")
    root = host.folder / "fork"
    shutil.copytree(host.root, root)
    (root / "mdistiller" / "dataset" / "tiny_imagenet.py").unlink()
    edit(root, *FORK)
    host.root = root
    return host


@pytest.mark.parametrize(
    ("distiller", "words"),
    [("DISK", []), ("DISK", ["SOLVER.TRAINER", "disk"]), ("DISK_SIMKD", []), ("MLKD", ["SOLVER.TRAINER", "ours"])],
)
def test_a_fork_without_tiny_imagenet_trains_resumes_and_evaluates(fork, capsys, distiller, words):
    folder = launch(fork, *words, distiller=distiller, epochs=1)
    assert launch(fork, *words, "--resume", distiller=distiller, epochs=2) == folder
    assert load(folder / "latest")["epoch"] == 2
    launch(fork, *words, "--evaluate", "best", distiller=distiller, epochs=2)
    assert "top-1" in capsys.readouterr().out


def test_a_key_of_the_fork_reaches_its_distiller_and_cannot_change_on_resume(fork):
    words = ["EXPERIMENT.LOGIT_STAND", "True"]
    plain, standardized = (
        launch(fork, *each, distiller="KD", epochs=1, out=out) for out, each in zip("ab", ([], words), strict=True)
    )
    assert plain.name != standardized.name
    assert yaml.safe_load((standardized / "settings.yaml").read_text())["EXPERIMENT.LOGIT_STAND"] is True
    states = [load(folder / "student_latest")["model"]["fc.weight"] for folder in (plain, standardized)]
    assert not torch.equal(*states)
    for flags in (["--resume"], ["--resume", "--allow-changed-settings"]):
        message = refused(fork, *flags, distiller="KD", out="b")
        assert "  EXPERIMENT.LOGIT_STAND: True then, False now" in message
        assert "EXPERIMENT.LOGIT_STAND cannot change within a run" in message
    assert launch(fork, *words, "--resume", distiller="KD", out="b") == standardized
    assert "EXPERIMENT.LOGIT_STAND True is for this checkout's own distillers, DISK" in refused(fork, *words)


def test_a_module_that_this_python_lacks_and_the_fork_does_not_use_is_stood_in_for(fork, monkeypatch):
    monkeypatch.delitem(sys.modules, "turtle", raising=False)
    monkeypatch.setitem(sys.modules, "_tkinter", None)
    monkeypatch.setitem(sys.modules, "tkinter", None)
    launch(fork, epochs=1)
    monkeypatch.delitem(sys.modules, "turtle")


NAMED = "        losses['loss_kd']\n        loss.backward()"
REFUSED = [
    # of the fork: file, old, new; words; the message
    (
        [],
        ["SOLVER.TRAINER", "ours"],
        "got 'ours', which calls the distiller with epoch, image_strong, image_weak, target",
    ),
    (
        [("mdistiller/engine/trainer.py", "        loss.backward()", NAMED)],
        [],
        "DISK cannot be trained by this checkout's own trainers: the base one reads loss_kd, which only distillers",
    ),
    (
        [("mdistiller/engine/cfg.py", '            "LR": 0.05,\n', "")],
        [],
        "the host's mdistiller/engine/cfg.py must have the keys ",
    ),
    (
        [("mdistiller/engine/cfg.py", '"KD": {', '"DISK": {"ALPHA": 1.0}, "KD": {')],
        [],
        "the host's mdistiller/engine/cfg.py has a section DISK of its own",
    ),
    (
        [
            ("mdistiller/engine/trainer.py", "save_checkpoint", "write_checkpoint"),
            ("mdistiller/engine/utils.py", "save_checkpoint", "write_checkpoint"),
        ],
        [],
        "mdistiller/engine/trainer.py must have BaseTrainer, adjust_learning_rate, save_checkpoint, load_checkpoint",
    ),
    (
        [("mdistiller/engine/__init__.py", "from .trainer", "import no_such_package\nfrom .trainer")],
        [],
        "mdistiller cannot be imported (No module named 'no_such_package'): this checkout needs the package no_",
    ),
    (
        [("mdistiller/engine/__init__.py", "trainer_dict =", "undefined\ntrainer_dict =")],
        [],
        "mdistiller cannot be imported (NameError: name 'undefined' is not defined): the checkout's own code fails at ",
    ),
    (
        [("mdistiller/models/__init__.py", "cifar_model_dict", "models_of_cifar")],
        ["--teacher-checkpoint", "teacher.pth"],
        "DATASET.TYPE 'cifar100' needs cifar_model_dict in the host's mdistiller/models, which has imagenet_model_dict",
    ),
    (
        [("mdistiller/dataset/__init__.py", "len(train.dataset), 100", "100")],
        [],
        "get_dataset must return (train_loader, val_loader, num_data, num_classes), got 3 values",
    ),
    (
        [("tools/train.py", "torch.nn.DataParallel(", "torch.nn.parallel.DistributedDataParallel(")],
        [],
        "tools/train.py trains by DistributedDataParallel, whose processes this launcher does not start: --scr",
    ),
    (
        [("mdistiller/models/__init__.py", "return self.fc(pooled), feats", "return self.fc(pooled), [pooled]")],
        [],
        "a model of the host returns (logits, features by name), Tiny returns (Tensor, list)",
    ),
    (
        [
            (
                "mdistiller/engine/utils.py",
                "def adjust_learning_rate(epoch, cfg",
                "def adjust_learning_rate(epoch, step, cfg",
            )
        ],
        ["SOLVER.TRAINER", "disk"],
        "SOLVER.TRAINER disk needs the host's adjust_learning_rate(epoch, cfg, optimizer), which takes (epoch, step",
    ),
    (
        [("tools/train.py", "    show_cfg(cfg)", '    {"kd": "KD"}[cfg.EXPERIMENT.TAG.split(",")[0]]')],
        [],
        "the host's tools/train.py ended before any training, by KeyError: 'disk' at ",
    ),
]


@pytest.mark.parametrize(("edits", "words", "message"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_what_a_fork_does_otherwise_is_refused_in_one_line_and_leaves_no_folder(fork, edits, words, message):
    teacher = shared.teacher_checkpoint(fork, fork.teacher)
    edit(fork.root, *edits)
    said = refused(fork, "--teacher-checkpoint", teacher, *words)
    assert message in said
    assert "\n" not in said
    assert not list(fork.folder.glob("out/*/*"))


def test_a_script_for_its_own_distillers_a_log_elsewhere_and_no_latest_train_by_the_plain_script(fork):
    trainer = "mdistiller/engine/trainer.py"
    edit(
        fork.root,
        ("tools/train.py", "    show_cfg(cfg)", '    {"kd": "KD"}[cfg.EXPERIMENT.TAG.split(",")[0]]'),
        (
            trainer,
            "os.path.join(cfg.LOG.PREFIX, experiment_name)",
            'os.path.join(cfg.LOG.PREFIX, experiment_name, "by time")',
        ),
        (trainer, 'names = ["latest", "student_latest"]', 'names = ["student_latest"]'),
        (trainer, '["best", "student_best"]', '["student_best"]'),
    )
    words = ["--script", "plain"]
    folder = launch(fork, *words, epochs=1)
    assert {"latest", "student_latest", "worklog.txt"} <= {path.name for path in folder.iterdir()}
    assert launch(fork, *words, "--resume", epochs=2) == folder
    assert load(folder / "latest")["epoch"] == 2
    assert run_folder(fork) == folder


def test_bases_with_a_configuration_and_models_of_logits_alone_train(fork):
    edit(
        fork.root,
        (
            "mdistiller/distillers/_base.py",
            "def __init__(self, student, teacher):",
            "def __init__(self, student, teacher, cfg=None):\n        cfg.EXPERIMENT",
        ),
        (
            "mdistiller/distillers/__init__.py",
            "super().__init__(student, teacher)",
            "super().__init__(student, teacher, cfg)",
        ),
        ("mdistiller/models/__init__.py", "return self.fc(pooled), feats", "return self.fc(pooled)"),
        ("mdistiller/distillers/_base.py", "return self.student(image)[0]", "return self.student(image)"),
    )
    assert "without 'pooled_feat': set DISK.GUIDE.USE_FEATURES False" in refused(fork)
    folder = launch(fork, "DISK.GUIDE.USE_FEATURES", "False", epochs=1)
    assert load(folder / "latest")["epoch"] == 1


def test_a_trainer_that_is_no_base_trainer_is_refused_where_it_would_ignore_seed_or_guide(fork):
    path = fork.root / "mdistiller" / "engine" / "__init__.py"
    path.write_text(
        path.read_text()
        + textwrap.dedent("""
        class Alone:
            pass
        trainer_dict["alone"] = Alone
    """)
    )
    assert "a BaseTrainer of the host, got 'alone', which is none" in refused(
        fork, "SOLVER.TRAINER", "alone", distiller="KD"
    )
