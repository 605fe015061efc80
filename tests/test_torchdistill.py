"""DiSK in torchdistill: its box against docs/write_a_host.md's loop, on the same batches; its own example script."""

import copy
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import SequentialSampler, TensorDataset

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.features import DKD, Guided, Method, Outputs
from disk_plugin.training import GuidedTraining
from disk_plugin.uniform import UniformGuide

pytest.importorskip("torchdistill")

import yaml  # which the host needs
from torchdistill.common.main_util import import_dependencies, load_ckpt, save_ckpt
from torchdistill.core.distillation import get_distillation_box

EPOCHS = 4
CHECKOUT = os.environ.get("DISK_TORCHDISTILL")
pytestmark = pytest.mark.filterwarnings("ignore:.*fully_shard:FutureWarning")


class Similarity(Method):
    """Reads features and a map, and trains a layer of its own."""

    reads = frozenset({"features", "hidden"})

    def __init__(self, *, width=8):
        super().__init__()
        self.project = nn.Linear(width, 7)

    def forward(self, student, teacher, target):
        assert student.maps["hidden"].shape == student.features.shape
        return {"cosine": 1 - F.cosine_similarity(self.project(student.features), teacher.features)}


def models():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5)), student


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(24, 4, generator=generator), torch.arange(24) % 5)


def batches():
    x, target = data().tensors
    return list(zip(x.split(6), target.split(6), strict=True))


def config(kwargs=None, **train):
    kwargs = {"num_classes": 5} if kwargs is None else kwargs
    loader = {"sampler": {"class_or_func": SequentialSampler, "kwargs": None}, "kwargs": {"batch_size": 6}}
    term = {"criterion": {"key": "DiSK", "kwargs": kwargs}, "weight": 1.0}
    model = {"forward_proc": "forward_batch_only", "sequential": [], "wrapper": None}
    return {
        "num_epochs": EPOCHS,
        "train_data_loader": {"dataset_id": "data", **loader},
        "val_data_loader": {"dataset_id": "data", **copy.deepcopy(loader)},
        "teacher": {**model, "requires_grad": False},
        "student": model,
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9}, **train.pop("optimizer", {})},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"disk": term}}},
        "pre_epoch_process": "disk_pre_epoch_process",
        "post_epoch_process": "disk_post_epoch_process",
        **train,
    }


def box_of(settings, *, seed=2, pair=None):
    import_dependencies([{"name": "disk_plugin.integrations.torchdistill"}])
    teacher, student = pair or models()
    torch.manual_seed(seed)
    return get_distillation_box(teacher, student, {"data": data()}, settings, torch.device("cpu"), None, False, 1)


def term_of(box):
    return box.criterion.term_dict["disk"][0]


def train(box, epochs, first=0, path=None):
    """Train as the host's example does; save where it does, before the end of the epoch's processes."""
    for epoch in range(first, epochs):
        box.pre_epoch_process(epoch=epoch)
        for x, target, supp in box.train_data_loader:
            loss = box.forward_process(x, target, supp)
            box.post_forward_process(loss=loss)
        box.student_model.eval()
        if path is not None:
            save_ckpt(box.student_model, box.optimizer, box.lr_scheduler, 0.0, None, f"{path}/{epoch}.pt")
        box.post_epoch_process()


def by_hand(guided, *, accumulate=1, scheduler=None):
    teacher, student = models()
    teacher.eval()
    training = GuidedTraining(guided, epochs=EPOCHS)
    optimizer = torch.optim.SGD([*student.parameters(), *guided.trainable_parameters()], 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2]) if scheduler else None
    for epoch in range(EPOCHS):
        training.begin_epoch(epoch)
        for index, (x, target) in enumerate(batches(), 1):
            with torch.no_grad():
                hidden = teacher[:3](x)
                shown = Outputs(teacher[3](hidden), hidden)
            hidden = student[:3](x)
            loss = training.loss(Outputs(student[3](hidden), hidden, {"hidden": hidden}), shown, target)
            (loss / accumulate).backward()
            if index % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        if schedule:
            schedule.step()
        training.end_epoch()
    return student


def assert_equal(found, expected):
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


HOOKS = {
    "student": {"forward_proc": "forward_batch_only", "forward_hook": {"input": ["3"], "output": ["2"]}},
    "teacher": {
        "forward_proc": "forward_batch_only",
        "requires_grad": False,
        "forward_hook": {"input": ["3"], "output": []},
    },
}
FEATURES = {"guide": {"feature_dim": 7}, "teacher_features": "3"}
OWN = {"method": {"key": "own_methods.Similarity", "logit_loss": True}, "student_features": "3"}
CASES = {  # the term's arguments, the train section's, the loss that they stand for
    "logits": ({"loss": {"temperature": 4}}, {}, lambda: DiSKLoss(GuideHead(5), temperature=4)),
    "features": (FEATURES, HOOKS, lambda: DiSKLoss(GuideHead(5, 7))),
    "uniform": ({"uniform": {"discount": "auto"}}, {}, lambda: DiSKLoss(UniformGuide(discount="auto"))),
    "dkd": ({"method": {"key": "dkd", "kwargs": {}}}, {}, lambda: Guided(DiSKLoss(GuideHead(5)), DKD())),
    "own": (
        {**OWN, **FEATURES, "student_maps": {"hidden": "2"}},
        HOOKS,
        lambda: Guided(DiSKLoss(GuideHead(5, 7)), Similarity(), logit_loss=True),
    ),
    "accumulated": ({}, {"optimizer": {"grad_accum_step": 2}}, lambda: DiSKLoss(GuideHead(5))),
    "scheduled": (
        {},
        {"scheduler": {"key": "MultiStepLR", "kwargs": {"milestones": [2]}}},
        lambda: DiSKLoss(GuideHead(5)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop_bit_for_bit(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_methods", types.SimpleNamespace(Similarity=Similarity))
    kwargs, section, loss = CASES[case]
    box = box_of(config({"num_classes": 5, **kwargs}, **copy.deepcopy(section)))
    train(box, EPOCHS)
    torch.manual_seed(2)
    loss = loss()
    guided = loss if isinstance(loss, Guided) else Guided(loss)
    student = by_hand(guided, accumulate=2 if case == "accumulated" else 1, scheduler=case == "scheduled")
    assert_equal(box.student_model, student)
    assert_equal(term_of(box).guided, guided)
    assert term_of(box).run.training.schedule.dual.epoch == EPOCHS


def test_the_teacher_is_frozen_in_evaluation_mode_and_in_no_checkpoint(tmp_path, caplog):
    teacher, student = models()
    before, modes, keys = copy.deepcopy(teacher.state_dict()), [], list(student.state_dict())
    teacher[1].register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    with caplog.at_level("INFO"):
        train(box_of(config(), pair=(teacher.train(), student)), EPOCHS, path=tmp_path)
    assert set(modes) == {(False, False)}
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    saved = torch.load(tmp_path / "3.pt", weights_only=True)
    assert list(saved["model"]) == keys
    parameters = list(student.parameters())
    assert [len(group["params"]) for group in saved["optimizer"]["param_groups"]] == [len(parameters)]
    assert len(saved["optimizer"]["state"]) == len(parameters)  # a plain optimizer's, the guide beside it
    assert saved["optimizer"]["param_groups"][0]["disk"].keys() == {"training", "optimizer", "epoch"}
    _, bare = models()
    load_ckpt(str(tmp_path / "3.pt"), model=bare, strict=True)
    assert_equal(bare, student)
    lines = [record.getMessage() for record in caplog.records if "logged_loss" in record.getMessage()]
    assert len(lines) == EPOCHS


@pytest.mark.parametrize(
    "optimizer", [{}, {"key": "AdamW", "kwargs": {"lr": 0.01}}, {"grad_accum_step": 2}, {"max_grad_norm": 0.1}], ids=str
)
@pytest.mark.parametrize("kwargs", [{}, {"uniform": {"discount": "auto"}}], ids=["guide", "uniform"])
def test_a_run_resumed_after_two_epochs_of_four_equals_the_whole_one_bit_for_bit(kwargs, optimizer, tmp_path):
    kwargs = {"num_classes": 5, **kwargs}
    whole = box_of(config(kwargs, optimizer=copy.deepcopy(optimizer)))
    train(whole, EPOCHS, path=tmp_path)
    teacher, student = models()
    path = str(tmp_path / "1.pt")
    load_ckpt(path, model=student, strict=True)
    again = box_of(config(kwargs, optimizer=copy.deepcopy(optimizer)), seed=3, pair=(teacher, student))  # another guide
    load_ckpt(path, optimizer=again.optimizer, lr_scheduler=again.lr_scheduler)
    train(again, EPOCHS, first=2)
    assert_equal(again.student_model, whole.student_model)
    assert_equal(term_of(again).guided, term_of(whole).guided)
    duals = [term_of(box).run.training.schedule.dual.state_dict() for box in (again, whole)]
    assert duals[0] == duals[1]
    assert "disk" not in again.optimizer.param_groups[0]


def test_a_checkpoint_of_another_epoch_or_without_the_guide(tmp_path, caplog):
    train(box_of(config()), 2, path=tmp_path)
    again = box_of(config())
    load_ckpt(str(tmp_path / "0.pt"), optimizer=again.optimizer)
    again.pre_epoch_process(epoch=0)
    assert "was saved in epoch 0, counted from 0, and the run goes on with epoch 0: is --start_epoch 1" in caplog.text
    plain = {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": KD}, "weight": 1.0}}}
    processes = {"pre_epoch_process": "default_pre_epoch_process_with_teacher"}
    processes["post_epoch_process"] = "default_post_epoch_process_with_teacher"
    train(box_of(config(criterion={"key": "WeightedSumLoss", "kwargs": plain}, **processes)), 1, path=tmp_path)
    again = box_of(config())
    load_ckpt(str(tmp_path / "0.pt"), optimizer=again.optimizer)
    with pytest.raises(RuntimeError, match="state holds none of DiSK's guide: a run without DiSK cannot be resumed"):
        again.pre_epoch_process(epoch=1)


KD = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "temperature": 4.0}
KD |= {"teacher_module_io": "output", "alpha": 0.9, "reduction": "batchmean"}


def test_groups_and_stages(tmp_path):
    parts = [{"module": "0"}, {"module": "3", "kwargs": {"lr": 0.2}}]
    box = box_of(config({"num_classes": 5, "param_group": 0}, optimizer={"module_wise_configs": parts}))
    train(box, 1, path=tmp_path)
    assert [len(group["params"]) for group in box.optimizer.param_groups] == [2 + len(term_of(box).run.parameters), 2]
    again = box_of(config(optimizer={"module_wise_configs": parts}), seed=3)
    load_ckpt(str(tmp_path / "0.pt"), optimizer=again.optimizer)
    again.pre_epoch_process(epoch=1)
    assert_equal(term_of(again).guided.disk.guide, term_of(box).guided.disk.guide)
    stages = {"stage1": config(num_epochs=1), "stage2": config(num_epochs=2)}
    box = box_of(stages)
    first = term_of(box)
    train(box, box.num_epochs)
    second = term_of(box)
    assert first is not second
    assert [term.run.training.schedule.dual.epoch for term in (first, second)] == [1, 2]


@pytest.mark.parametrize(
    ("kwargs", "train_section", "error", "message"),
    [
        ({"method": {"key": "simkd"}}, {}, ValueError, "simkd predicts by parameters beside the student's"),
        ({"method": {"key": "fitnet"}}, {}, ValueError, r"method must be one of \[.*'dkd', .*\] or a class"),
        ({"guide": {"feature_dim": 7}}, {}, ValueError, "a guide with feature_dim needs teacher_features"),
        ({"epochs": 0}, {}, ValueError, "epochs must be >= 1, got 0"),
        ({"loss": {"temprature": 4}}, {}, TypeError, "temprature"),
        (FEATURES, {}, ValueError, r"teacher: forward_hook: input must name '3', got \[\]"),
        ({}, {"teacher": {"forward_proc": "forward_batch_only"}}, ValueError, "set requires_grad: False in the teach"),
        ({}, {"pre_epoch_process": "default_pre_epoch_process_with_teacher"}, RuntimeError, "needs pre_epoch_process"),
        ({}, {"optimizer": {"key": "Adagrad", "kwargs": {"lr": 0.1}}}, RuntimeError, "as Adagrad does"),
        (
            {},
            {"criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {}}}},
            ValueError,
            "the criterion needs one term with key: 'DiSK', got 0",
        ),
    ],
)
def test_what_it_cannot_train(kwargs, train_section, error, message):
    with pytest.raises(error, match=message):
        train(box_of(config({"num_classes": 5, **kwargs}, **copy.deepcopy(train_section))), 1)


class Convs(nn.Module):
    """A network with two stages, as a tail is found by their names."""

    def __init__(self, width):
        super().__init__()
        self.layer3 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.fc(self.avgpool(self.layer4(self.layer3(x))).flatten(1))


def scalekd_box(path=None, **kwargs):
    """A box whose method is built for its two networks; the student's weights are those of a checkpoint, if any."""
    torch.manual_seed(0)
    pair, maps = (Convs(8), Convs(4)), {"before_last": "layer3", "last": "layer4"}
    if path is not None:
        load_ckpt(path, model=pair[1], strict=True)
    own = {"method": {"key": "scalekd", "kwargs": {"norm": "layer"}}, "image_size": [3, 8, 8], "student_maps": maps}
    settings = config({"num_classes": 5, **own, "teacher_maps": {"last": "layer4"}, **kwargs})
    settings["student"] |= {"forward_hook": {"input": [], "output": ["layer3", "layer4"]}}
    settings["teacher"] |= {"forward_hook": {"input": [], "output": ["layer4"]}}
    return box_of(settings, pair=pair)


def image_batches():
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 5) for _ in range(3)]


def steps(box, first, last):
    torch.manual_seed(7)  # the method is built when training begins
    for epoch in range(first, last):
        box.pre_epoch_process(epoch=epoch)
        for x, target in image_batches():
            box.post_forward_process(loss=box.forward_process(x, target, {}))
        if epoch + 1 == last:
            return
        box.post_epoch_process()


def test_scalekd_is_built_for_the_two_networks_trained_and_resumed(tmp_path):
    whole, half = scalekd_box(), scalekd_box()
    teacher = copy.deepcopy(whole.teacher_model.state_dict())
    assert term_of(whole).guided.method is None
    steps(whole, 0, 2)
    steps(half, 0, 1)
    save_ckpt(half.student_model, half.optimizer, half.lr_scheduler, 0.0, None, str(tmp_path / "0.pt"))
    again = scalekd_box(str(tmp_path / "0.pt"))
    load_ckpt(str(tmp_path / "0.pt"), optimizer=again.optimizer)
    steps(again, 1, 2)
    assert set(again.student_model.state_dict()) == set(Convs(4).state_dict())
    for one, other in ((whole.student_model, again.student_model), (term_of(whole).guided, term_of(again).guided)):
        assert_equal(one, other)
    assert all(torch.equal(value, teacher[key]) for key, value in whole.teacher_model.state_dict().items())


def test_a_method_that_cannot_be_built_for_the_two_networks_says_why():
    with pytest.raises(ValueError, match=r"image_size must be \[C, H, W\] of the training images, got \[8\]"):
        scalekd_box(image_size=[8]).pre_epoch_process(epoch=0)
    with pytest.raises(ValueError, match="ScaleKD needs the map 'before_last' of the student"):
        scalekd_box(student_maps={"last": "layer4"}).pre_epoch_process(epoch=0)


def test_labels_and_logits_are_needed():
    box = box_of(config())
    box.pre_epoch_process(epoch=0)
    with pytest.raises(ValueError, match="DiSK needs labels, got targets of type NoneType"):
        box.forward_process(torch.randn(3, 4), None, {})
    with pytest.raises(TypeError, match=r"must return logits .* got dict with keys \['hidden'\]"):
        term_of(box)({".": {"output": {"hidden": 1}}}, {".": {"output": torch.randn(3, 5)}}, torch.arange(3))


def test_clipping_first_shortens_the_guides_gradient():
    budget = {"num_classes": 5, "loss": {"multiplier": 5000.0, "budget": 0.0, "guide_gradient_scale": None}}
    box = box_of(config(budget, optimizer={"max_grad_norm": 0.01}))
    box.pre_epoch_process(epoch=0)
    lengths = []

    def seen(*_):
        groups = box.student_model.parameters(), term_of(box).guided.parameters()
        lengths.append([torch.cat([p.grad.flatten() for p in group]).norm().item() for group in groups])

    box.optimizer.register_step_pre_hook(seen)
    for x, target in batches():
        box.post_forward_process(loss=box.forward_process(x, target, {}))
    assert len(lengths) == 4
    for student, guide in lengths:
        assert 0.01 / 2**0.5 * 0.999 <= student <= 0.01
        assert 0 < guide <= student * 1.001


def test_the_lines_that_the_docs_show_train():
    page = (Path(__file__).parents[1] / "docs/hosts/torchdistill.md").read_text()
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert [each["name"] for each in shown["dependencies"]] == ["disk_plugin.integrations.torchdistill"]
    section = shown["train"]
    kwargs = section["criterion"]["kwargs"]["sub_terms"]["disk"]["criterion"]["kwargs"]
    kwargs["num_classes"] = 5
    section["teacher"]["forward_proc"] = "forward_batch_only"
    box = box_of(config(**section))
    train(box, 1)
    assert term_of(box).guided.disk.temperature == 4


def test_accelerate_is_refused():
    box = box_of(config())
    box.accelerator = object()
    with pytest.raises(RuntimeError, match="DiSK is not trained under accelerate"):
        box.pre_epoch_process(epoch=0)


@pytest.mark.parametrize(
    ("version", "message"), [("1.1.4", "needs torchdistill >= 1.1.5, got 1.1.4: pip install"), (None, "found none")]
)
def test_a_host_that_is_absent_or_too_old_is_named_with_the_pip_line(version, message, monkeypatch):
    old = None if version is None else types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "torchdistill", old)
    monkeypatch.delitem(sys.modules, "disk_plugin.integrations.torchdistill", raising=False)
    with pytest.raises(ImportError, match=message):
        import disk_plugin.integrations.torchdistill  # noqa: F401


MODELS = """
import torch
from torch import nn
from torchdistill.models.registry import register_model


@register_model(key="tiny_student")
class Student(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        super().__init__(*layers, nn.Flatten(), nn.Linear(4, 8))


@register_model(key="tiny_teacher")
class Teacher(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
        corners = torch.tensor([[k >> i & 1 for i in range(3)] for k in range(8)]).float() - 0.5
        self[3].weight.data, self[3].bias.data = 40 * corners, -20 * corners.sum(1)
"""
YAML = """
dependencies: [{name: tiny_models}, {name: disk_plugin.integrations.torchdistill}]
datasets:
  images: !import_call
    key: 'torchvision.datasets.ImageFolder'
    init:
      kwargs:
        root: ROOT/images
        transform: !import_call {key: 'torchvision.transforms.ToTensor', init: }
models:
  teacher_model: {key: tiny_teacher, kwargs: {}}
  student_model: {key: tiny_student, kwargs: {}, src_ckpt: SOURCE, dst_ckpt: ROOT/NAME.pt}
train:
  log_freq: 100
  num_epochs: EPOCHS
  train_data_loader: &loader
    dataset_id: images
    sampler:
      class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}
      kwargs:
    kwargs: {batch_size: 8, num_workers: 0}
  val_data_loader: {<<: *loader}
  teacher: {forward_proc: forward_batch_only, sequential: [], wrapper: DataParallel, requires_grad: False}
  student: {forward_proc: forward_batch_only, sequential: [], wrapper: DistributedDataParallel}
  optimizer: {key: SGD, kwargs: {lr: 0.03, momentum: 0.9}}
  pre_epoch_process: 'disk_pre_epoch_process'
  post_epoch_process: 'disk_post_epoch_process'
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        disk:
          criterion: {key: 'DiSK', kwargs: {num_classes: 8, epochs: 4, loss: {temperature: 4}}}
          weight: 1.0
test:
  test_data_loader: {<<: *loader}
"""


def write_images(folder):
    from PIL import Image

    torch.manual_seed(0)
    for label in range(8):
        (folder / str(label)).mkdir(parents=True)
        colour = torch.tensor([label >> i & 1 for i in range(3)]) * 130 + 60
        for number in range(6):
            pixels = (colour + 25 * torch.randn(12, 12, 3)).clamp(0, 255).byte()
            Image.frombytes("RGB", (12, 12), pixels.numpy().tobytes()).save(folder / str(label) / f"{number}.png")


def example(root, name, epochs, *flags, source=""):
    """Run the host's own script; return its log."""
    text = YAML.replace("ROOT", str(root)).replace("NAME", name).replace("EPOCHS", str(epochs))
    (root / f"{name}.yaml").write_text(text.replace("SOURCE", source))
    (root / "tiny_models.py").write_text(MODELS)
    script = Path(CHECKOUT) / "examples/torchvision/image_classification.py"
    words = [sys.executable, script, "--config", root / f"{name}.yaml", "--device", "cpu", "--seed", "1", *flags]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(CHECKOUT is None, reason="DISK_TORCHDISTILL must name a checkout of torchdistill")
def test_the_hosts_example_trains_and_resumes_bit_for_bit(tmp_path):
    write_images(tmp_path / "images")
    log = example(tmp_path, "whole", 4)
    assert log.count("DiSK: multiplier") == 4
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert whole["optimizer"]["param_groups"][0]["disk"]["epoch"] == 3  # it saves what validates best
    example(tmp_path, "part", 2)
    first = torch.load(tmp_path / "part.pt", weights_only=False)
    assert first["optimizer"]["param_groups"][0]["disk"]["epoch"] == 1
    log = example(tmp_path, "again", 4, "--start_epoch", "2", source=str(tmp_path / "part.pt"))
    assert log.count("DiSK: multiplier") == 2
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    for key in ("model", "optimizer"):
        torch.testing.assert_close(again[key], whole[key], rtol=0, atol=0)
