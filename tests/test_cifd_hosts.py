"""CIFD with fitted modules in the hosts that take any two classifiers; mdistiller and timm are in their own tests."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.distiller import Distiller
from disk_plugin.features import CIFD, Guided
from disk_plugin.features.cifd import RateDistortionModule

C, S, T = 5, 8, 7

pytestmark = pytest.mark.filterwarnings("ignore:the bottleneck.s noise")  # of tiny students


def models():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, S), nn.BatchNorm1d(S), nn.ReLU(), nn.Linear(S, C))
    return student, nn.Sequential(nn.Linear(4, T), nn.ReLU(), nn.Linear(T, C))


def data():
    torch.manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(24, 4), torch.arange(24) % C)


@pytest.fixture
def rdms():
    """Modules that say they were fitted."""
    torch.manual_seed(2)
    modules = RateDistortionModule(T, C, distortion_weights=(1e3, 1e2))
    modules.report = {"rate": [2.0, 1.0], "distortion": [1.0, 2.0], "accuracy": None, "samples": 1}
    return modules


def guided(rdms, **settings):
    torch.manual_seed(3)
    return Guided(DiSKLoss(GuideHead(C, T)), CIFD(S, T, rdms=rdms, **settings))


def test_a_distiller_trains_by_it_and_leaves_the_student_as_it_was_built(rdms):
    student, teacher = models()
    distiller = Distiller(student, teacher, guided(rdms))
    keys, before = list(student.state_dict()), copy.deepcopy(rdms.state_dict())
    optimizer = torch.optim.SGD([each for each in distiller.parameters() if each.requires_grad], lr=0.1)
    x, target = data().tensors
    for _ in range(3):
        optimizer.zero_grad()
        distiller.train()(x, target).loss.backward()
        optimizer.step()
    assert list(student.state_dict()) == keys
    assert distiller.guided.method.training
    assert not distiller.guided.method.embeddings.rdms.training
    assert torch.equal(distiller.eval()(x), student(x))
    assert all(torch.equal(rdms.state_dict()[name], value) for name, value in before.items() if "extra" not in name)
    # the classifier learns from noisy features, by the tapped layer itself
    assert student[3].weight.grad.any()
    with pytest.raises(ValueError, match="must be fitted before the student's training"):
        Distiller(*models(), Guided(DiSKLoss(GuideHead(C)), CIFD(S, T, C)))(x, target)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the host's own calls of torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers|the teacher is right on")
def test_lightning(rdms, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from disk_plugin.integrations.lightning import DiSKCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = models()[0]

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module, callback = Module(), DiSKCallback(models()[1], guided(rdms))
    before = copy.deepcopy(module.state_dict())
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[callback], accelerator="cpu", enable_model_summary=False,
        default_root_dir=tmp_path, **quiet,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(), 6))
    assert module.state_dict().keys() == before.keys()
    assert not torch.equal(module.state_dict()["net.3.weight"], before["net.3.weight"])
    assert callback.guided.method.dropout.step == 8
    assert not callback.guided.method.embeddings.rdms.training
    assert "disk_feature" in trainer.callback_metrics


def test_transformers(tmp_path):
    shared = pytest.importorskip("test_transformers")
    torch.manual_seed(2)
    modules = RateDistortionModule(16, shared.C, distortion_weights=(1e3,), nonnegative=False)
    modules.report = {"rate": [2.0], "distortion": [1.0], "accuracy": None, "samples": 1}
    loss = Guided(shared.loss_of(), CIFD(8, 16, rdms=modules))
    trainer = shared.trained(tmp_path, loss)
    assert trainer.guided.method.dropout.step == 6
    before = shared.convnext().state_dict()
    assert trainer.model.state_dict().keys() == before.keys()
    assert not torch.equal(trainer.model.classifier.weight, before["classifier.weight"])


def test_torchdistill_by_a_file_of_modules(rdms, tmp_path):
    shared = pytest.importorskip("test_torchdistill")
    rdms.save(tmp_path / "rdms.pt")
    method = {"key": "cifd", "kwargs": {"student_dim": 8, "teacher_dim": 7, "rdms_file": str(tmp_path / "rdms.pt")}}
    term = {"num_classes": 5, "method": method, "student_features": "3", **shared.FEATURES}
    box = shared.box_of(shared.config(term, **copy.deepcopy(shared.HOOKS)))
    before = copy.deepcopy(box.student_model.state_dict())
    shared.train(box, 2, path=tmp_path)
    assert box.student_model.state_dict().keys() == before.keys()
    assert not torch.equal(box.student_model.state_dict()["3.weight"], before["3.weight"])
    # the last epoch's file, resumed, holds modules and counter
    saved = torch.load(tmp_path / "1.pt", weights_only=True)["optimizer"]["param_groups"][0]["disk"]["training"]
    assert saved["method"]["dropout.step"] == 8
    assert "embeddings.rdms.encoder.0.weight" in saved["method"]
