"""What the mdistiller launcher offers beside the host: own models and datasets, an estimated budget, the control."""

import sys

import pytest
import test_mdistiller as shared
import torch
import yaml
from test_mdistiller import launch, load, refused
from torch import nn

host = shared.host
pytestmark = shared.pytestmark

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


class Data(Dataset):
    def __init__(self, count, indexed):
        generator = torch.Generator().manual_seed(count)
        self.images = torch.randn(count, 3, 16, 16, generator=generator)
        self.indexed = indexed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        sample = self.images[index], index % 7
        return (*sample, index) if self.indexed else sample


def get_data(cfg, root=None):
    train, val = DataLoader(Data(24, INDEXED), cfg.SOLVER.BATCH_SIZE, shuffle=True), DataLoader(Data(8, False), 8)
    return train, val, 24, 7


MODELS = {"wide": lambda num_classes: Net(num_classes, 8), "narrow": Net}
DATASETS = {"noise": get_data, "unrooted": lambda cfg: get_data(cfg)}
"""


@pytest.fixture
def own(host, monkeypatch):
    """A module of the user's own beside the run: two models that return logits alone, a dataset of seven classes."""
    monkeypatch.syspath_prepend(str(host.folder))

    def module(text=None):
        sys.modules.pop("my_things", None)
        (host.folder / "my_things.py").write_text(text or MODULE.replace("INDEXED", "True"))
        return ["--import", "my_things"]

    yield module
    sys.modules.pop("my_things", None)


def own_teacher(host, classes=7):
    sys.path.insert(0, str(host.folder))
    import my_things

    path = host.folder / "wide.pth"
    torch.save(my_things.Net(classes, 8).state_dict(), path)
    return ["--teacher-checkpoint", str(path), "DISTILLER.TEACHER", "wide", "DISTILLER.STUDENT", "narrow"]


@pytest.mark.parametrize("words", [("DISK",), ("DISK", "SOLVER.TRAINER", "disk"), ("KD",)], ids=" ".join)
def test_own_models_on_an_own_dataset_train_resume_and_evaluate(host, own, capsys, words):
    distiller, *words = words
    words = [*own(), *own_teacher(host), *words, "DATASET.TYPE", "noise", "--data-root", str(host.folder)]
    folder = launch(host, *words, distiller=distiller, epochs=1)
    weights = load(folder / "student_latest")["model"]
    assert {name: tuple(value.shape) for name, value in weights.items()}["head.weight"] == (7, 4)
    if distiller == "DISK":  # the guide reads the pooled features, and the number of classes is the dataset's
        assert load(folder / "latest")["model"]["module.disk.guide.mlp.0.weight"].shape[1] == 7 + 8
    assert yaml.safe_load((folder / "settings.yaml").read_text())["data"] == "noise of 24 images, 7 classes"
    assert launch(host, *words, "--resume", distiller=distiller, epochs=2) == folder
    launch(host, *words, "--evaluate", "best", distiller=distiller, epochs=2)
    assert "top-1" in capsys.readouterr().out


def test_own_models_train_on_the_hosts_dataset(host, own):
    words = [*own(), *own_teacher(host, 100)]
    assert load(launch(host, *words, epochs=1) / "student_latest")["model"]["head.weight"].shape == (100, 4)


def test_what_own_models_and_datasets_must_be_is_said(host, own):
    words = [*own(), *own_teacher(host)]
    assert "DISTILLER.STUDENT must be one of " in refused(host, *words, "DISTILLER.STUDENT", "nobody")
    assert "narrow, " in refused(host, *words, "DISTILLER.STUDENT", "nobody")
    kind = ["DATASET.TYPE", "unrooted", "--data-root", "/nowhere"]
    assert "--data-root needs a dataset that takes root, 'unrooted' of --import takes" in refused(host, *words, *kind)
    words[:2] = own(MODULE.replace("INDEXED", "False"))
    noise = ["DATASET.TYPE", "noise", "--data-root", "/nowhere"]
    expected = "a training sample of DATASET.TYPE noise must be (image, target, index), got 2 values"
    assert expected in refused(host, *words, *noise)
    own(MODULE.replace("INDEXED", "True") + f"MODELS[{host.teacher!r}] = Net\n")
    assert f"--import: MODELS has {host.teacher!r}, which the host has too: rename it" in refused(host, *words)
    own("MODELS = [1]\n" + "DATASETS = {}\n")
    assert "--import my_things: MODELS must be a dict of constructors that take num_classes" in refused(host, *words)
    assert not (host.folder / "out").exists()


def test_a_model_that_returns_logits_shows_its_features_and_keeps_its_names(host):
    shared.registered(host)
    from disk_plugin.integrations.mdistiller.own import showing_features

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 3, 2, 2)
    names, expected, features = list(model.state_dict()), model(x), model[:3](x)
    shown = showing_features(model)
    logits, found = shown(x)
    assert list(shown.state_dict()) == names
    assert torch.equal(logits, expected)
    assert torch.equal(found["pooled_feat"], features)
    scaled = showing_features(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Softmax(1)))
    assert scaled(x)[1] == {}  # what the last Linear reads does not make this output


def warm(host, *words):
    """A student of --distiller NONE, as the launcher's own helper passes a teacher to every run."""
    from test_mdistiller import purge

    shared.teacher_checkpoint(host, host.teacher)
    purge()
    from disk_plugin.integrations.mdistiller.__main__ import main

    out = host.folder / "warm"
    command = ["--host", str(host.root), "--distiller", "NONE", "--cfg", host.cfg, "--device", "cpu", "--seed", "1"]
    options = ["DISTILLER.STUDENT", host.student, "SOLVER.BATCH_SIZE", "8", "SOLVER.EPOCHS", "1"]
    main([*command, "--data-root", str(host.folder / "data"), *options, "LOG.PREFIX", str(out), *words])
    (folder,) = out.glob("*/*")
    return folder / "student_latest"


def test_the_budget_is_the_warm_starts_error_on_held_out_images_and_stays_on_resume(host, capsys, monkeypatch):
    held = ["DATASET.HELD_OUT", "0.25"]
    words = [*held, "DISTILLER.WARM_START", str(warm(host, *held)), "DISK.BUDGET", "estimate"]
    folder = launch(host, *words, epochs=1)
    out = capsys.readouterr().out
    found = yaml.safe_load((folder / "budget.yaml").read_text())
    assert "the warm start's error on 6 of 24 training images\n" in out
    assert found["how"] in (folder / "worklog.txt").read_text()
    assert 0 < found["budget"] <= 1
    assert load(folder / "latest")["model"]["module.disk.budget"] == pytest.approx(found["budget"])
    assert yaml.safe_load((folder / "settings.yaml").read_text())["DISK.BUDGET"] == "estimate"
    (folder / "budget.yaml").write_text(yaml.safe_dump({**found, "budget": 0.125}))
    assert launch(host, *words, "--resume", epochs=2) == folder
    assert load(folder / "latest")["model"]["module.disk.budget"] == 0.125
    assert "DISK.BUDGET: estimate then, 0.3 now" in refused(host, *words[:-1], "0.3", "--resume", epochs=2)


def test_an_estimate_says_where_the_warm_start_may_have_seen_the_images_and_what_it_needs(host, capsys):
    message = "DISK.BUDGET estimate needs DISTILLER.WARM_START FILE"
    assert message in refused(host, "DISK.BUDGET", "estimate")
    assert "needs a distiller with a guide, got KD" in refused(host, "DISK.BUDGET", "estimate", distiller="KD")
    assert "DATASET.HELD_OUT must be a share" in refused(host, "DATASET.HELD_OUT", "1.5")
    launch(host, "DISTILLER.WARM_START", str(warm(host)), "DISK.BUDGET", "estimate", epochs=1)
    out = capsys.readouterr().out
    assert "on 2 of 24 training images; its run does not say that it left them out" in out
    assert "--distiller NONE DATASET.HELD_OUT 0.1" in out


def test_held_out_images_are_the_same_under_every_seed_and_no_batch_shows_them(host):
    modules = shared.registered(host)
    from disk_plugin.integrations.mdistiller import host as adapter
    from disk_plugin.integrations.mdistiller import loaders

    cfg = modules.engine_cfg.CFG.clone()
    cfg.DATASET.HELD_OUT, cfg.DATASET.NUM_WORKERS = 0.25, 0
    adapter.use_data(cfg, str(host.folder / "data"))
    loaders.share({})
    seen = {int(index) for batch in loaders.load(cfg).train for index in batch[2]}
    assert len(seen) == 18
    assert seen == set(range(24)) - set(loaders.held_out(24, 0.25))
    torch.manual_seed(7)
    assert seen == set(range(24)) - set(loaders.held_out(24, 0.25))


def test_the_uniform_control_trains_with_one_g_and_no_parameters(host):
    folder = launch(host, "DISK.UNIFORM", "True", epochs=1)
    state = load(folder / "latest")["model"]
    assert {name for name in state if name.startswith("module.disk.guide.")} == {
        f"module.disk.guide.{name}" for name in ("log_guide", "agreement", "last_agreement", "progress", "gate")
    }
    assert launch(host, "DISK.UNIFORM", "True", "--resume", epochs=2) == folder
    assert "DISK.UNIFORM cannot change within a run" in refused(host, "--resume", epochs=2)
    launch(host, "DISK.UNIFORM", "True", "DISK.DISCOUNT", "0.2", distiller="DISK_DKD", epochs=1, out="guided")
    assert "leave out what asks for a budget" in refused(host, "DISK.UNIFORM", "True", "DISK.BUDGET", "0.2")
    assert "has no guide that Algorithm 1 could train" in refused(
        host, "DISK.UNIFORM", "True", "SOLVER.TRAINER", "disk"
    )
