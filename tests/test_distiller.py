"""Student, teacher and loss as one module, against README's loop."""

import copy
import io
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
    with pytest.raises(ValueError, match=r"SimKD reads \['last'\], of which only features can be found in any"):
        Distiller(*models(), Guided(DiSKLoss(GuideHead(5)), simkd))


def trained(distiller, optimizer, epochs, first=0):
    for _ in range(first, epochs):
        for x, target in batches():
            optimizer.zero_grad()
            distiller(x, target).loss.backward()
            optimizer.step()


def test_it_makes_the_loss_that_fits_the_teacher_and_steps_its_schedule():
    (student, teacher), epochs = models(), 3
    torch.manual_seed(2)
    disk = DiSKLoss(GuideHead(5, 8), temperature=4)
    expected = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), disk, epochs=epochs)
    optimizer = sgd(expected.parameters())
    for epoch in range(epochs):
        trained(expected, optimizer, 1)
        if epoch < epochs - 1:
            expected.dual.step()
    torch.manual_seed(2)
    found = Distiller(student, teacher, epochs=epochs, steps_per_epoch=3, temperature=4)
    trained(found, sgd(found.parameters()), epochs)
    assert found.dual.epoch == epochs - 1
    assert found.guided.disk.statistics().positions == 18  # of the last epoch, still to be read
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("epochs", [1, 2])
def test_it_resumes_its_schedule(epochs):
    student, teacher = models()
    whole = Distiller(copy.deepcopy(student), teacher, epochs=4, steps_per_epoch=3)
    again = Distiller(student, teacher, epochs=4, steps_per_epoch=3)
    optimizer = sgd(whole.parameters())
    trained(whole, optimizer, epochs)
    buffer = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    saved, momentum = torch.load(buffer, weights_only=True)
    trained(whole, optimizer, 4, first=epochs)
    again.load_state_dict(saved)
    optimizer = sgd(again.parameters())
    optimizer.load_state_dict(momentum)
    trained(again, optimizer, 4, first=epochs)
    assert again.dual.epoch == whole.dual.epoch == 3
    for one, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    Distiller(*models()).load_state_dict(saved)  # to look at it, without a schedule


def test_only_batches_that_are_trained_on_count():
    distiller = Distiller(*models(), epochs=2, steps_per_epoch=1)
    x, target = batches()[0]
    distiller(x, target)
    with torch.no_grad():
        distiller(x, target)
    distiller.eval()(x, target)
    distiller.train()(x)
    assert distiller.dual.epoch == 0
    distiller(x, target)
    assert distiller.dual.epoch == 1


def test_a_state_without_a_schedule_does_not_resume_one():
    with pytest.raises(RuntimeError, match="saved by a Distiller without epochs"):
        Distiller(*models(), epochs=2).load_state_dict(Distiller(*models()).state_dict())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"steps_per_epoch": 3}, ValueError, "needs epochs, got None"),
        ({"steps_per_epoch": 0, "epochs": 2}, ValueError, "steps_per_epoch must be >= 1, got 0"),
        ({"epochs": 0}, ValueError, "epochs must be >= 1, got 0"),
        ({"loss": DiSKLoss(GuideHead(5)), "temperature": 4}, TypeError, r"\['temperature'\] are settings of a loss"),
        ({"temprature": 4}, TypeError, "temprature"),
        ({"loss": nn.Linear(2, 2)}, TypeError, "loss must be a DiSKLoss or a Guided, got Linear"),
    ],
)
def test_what_it_cannot_be_built_from(given, error, message):
    with pytest.raises(error, match=message):
        Distiller(*models(), **given)


@pytest.mark.parametrize("shared", ["the model", "a module", "a weight"])
def test_a_teacher_that_shares_what_the_student_trains_is_refused_before_it_is_frozen(shared):
    student, teacher = models()
    if shared == "the model":
        teacher = student
    elif shared == "a module":
        teacher[0] = student[0]
    else:
        teacher[3].weight = student[2].weight
    with pytest.raises(ValueError, match=r"must share no trainable parameter.* pass copy.deepcopy\(model\) as teacher"):
        Distiller(student, teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    Distiller(student, copy.deepcopy(teacher))
    student.requires_grad_(False)[2].bias.requires_grad_(True)  # of a frozen base, as adapters have it, both may read
    Distiller(student, teacher) if shared != "the model" else None


def test_a_single_epoch_in_which_the_discount_never_moves_is_told():
    with pytest.warns(UserWarning, match="epochs=1 training ends at progress 0, where discount='auto' is plain dist"):
        Distiller(*models(), epochs=1, steps_per_epoch=20)


def test_a_convolution_as_the_tapped_layer_tells_the_classes():
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1), nn.Flatten())
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    distiller = Distiller(student, with_features(teacher.eval(), "2"))
    assert (distiller.guided.disk.guide.num_classes, distiller.guided.disk.guide.feature_dim) == (5, 8)
    distiller(torch.randn(6, 3, 2, 2), torch.arange(6) % 5).loss.backward()


def test_it_keeps_the_students_logits_for_its_accuracy():
    student, teacher = models()
    distiller, (x, target) = Distiller(student, teacher), batches()[0]
    distiller(x, target)
    torch.testing.assert_close(distiller.logits, student(x).detach(), rtol=0, atol=0)
    assert not distiller.logits.requires_grad
    assert set(distiller.state_dict()) == set(Distiller(*models()).state_dict())


def test_a_run_that_is_made_longer_resumes_at_its_new_progress():
    short = Distiller(*models(), epochs=2, steps_per_epoch=3)
    trained(short, sgd(short.parameters()), 2)
    short.dual.step()
    longer = Distiller(*models(), epochs=8)
    longer.load_state_dict(short.state_dict())
    assert short.guided.disk.level.progress == 1
    assert longer.guided.disk.level.progress == 0.25
    wrapped, nested = (nn.ModuleDict({"distiller": Distiller(*models(), epochs=8)}) for _ in range(2))
    nested.load_state_dict({f"distiller.{key}": value for key, value in short.state_dict().items()})
    assert nested["distiller"].guided.disk.level.progress == 0.25
    assert wrapped["distiller"].guided.disk.level.progress == 0
