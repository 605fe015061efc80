"""Student, teacher and loss as one module, against README's loop."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.distiller import Distiller
from disk_plugin.features import DKD, Guided, Method, SimKD
from disk_plugin.features.simkd import pooled_classifier
from disk_plugin.taps import with_features


class Similarity(Method):
    reads = frozenset({"features"})

    def forward(self, student, teacher, target):
        return {"cosine": 1 - F.cosine_similarity(student.features, teacher.features)}


def models():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    return student, nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.arange(6) % 5) for _ in range(count)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_it_is_readmes_loop_bit_for_bit():
    student, teacher = models()
    torch.manual_seed(2)
    disk = DiSKLoss(GuideHead(5, 8))
    distiller = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), copy.deepcopy(disk))
    tapped, optimizer = with_features(teacher.eval()), sgd([*student.parameters(), *disk.parameters()])
    dual = DualScheduler(disk, epochs=2)
    for x, target in batches():
        with torch.no_grad():
            teacher_logits, features = tapped(x)
        optimizer.zero_grad()
        disk(student(x), teacher_logits, target, features).backward()
        optimizer.step()
    dual.step()
    optimizer, dual = sgd(distiller.parameters()), DualScheduler(distiller.guided.disk, epochs=2)
    for x, target in batches():
        optimizer.zero_grad()
        distiller(x, target).loss.backward()
        optimizer.step()
    dual.step()
    for mine, theirs in ((distiller.student, student), (distiller.guided.disk, disk)):
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_the_teacher_is_frozen_moves_along_and_is_saved_nowhere():
    student, teacher = models()
    distiller = Distiller(student, teacher, DiSKLoss(GuideHead(5, 8)))
    assert not any("teacher" in name for name in distiller.state_dict())
    assert {id(p) for p in teacher.parameters()}.isdisjoint(map(id, distiller.parameters()))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = copy.deepcopy(teacher.state_dict())
    distiller.train()
    distiller(*batches()[0]).loss.backward()
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert next(distiller.double().teacher.parameters()).dtype == torch.double
    again = pickle.loads(pickle.dumps(copy.deepcopy(distiller)))
    x, target = batches()[0]
    torch.testing.assert_close(again.eval()(x.double(), target).loss, distiller.eval()(x.double(), target).loss)


@pytest.mark.parametrize("method", [None, DKD(), Similarity()], ids=["disk", "dkd", "features"])
def test_every_method_that_reads_logits_or_features_trains(method):
    student, teacher = models()
    distiller = Distiller(student, teacher, Guided(DiSKLoss(GuideHead(5)), method))
    distiller(*batches()[0]).loss.backward()
    moved = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in student[:1].parameters()]
    assert all(moved)
    x = batches()[0][0]
    assert torch.equal(distiller.eval()(x), student(x))
    assert {name for name in distiller.state_dict() if name.startswith("student.")} == {
        f"student.{name}" for name in student.state_dict()
    }


def test_a_loss_that_is_none_and_a_method_that_reads_maps_are_refused():
    with pytest.raises(TypeError, match="loss must be a DiSKLoss or a Guided, got CrossEntropyLoss"):
        Distiller(*models(), nn.CrossEntropyLoss())
    simkd = SimKD(3, 8, pooled_classifier(nn.Linear(8, 5)), teacher_size=(4, 4))
    with pytest.raises(ValueError, match=r"SimKD reads \['last'\], of which any classifier shows features alone"):
        Distiller(*models(), Guided(DiSKLoss(GuideHead(5)), simkd))
