"""capacity_gap: what it measures, what it recommends, what it refuses, and that its thresholds are the map's."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from regime import rule
from torch import nn

from disk_plugin import DiSKLoss, GuideHead, functional
from disk_plugin.diagnostics import CapacityGap, capacity_gap
from disk_plugin.diagnostics.capacity import FEWEST_CLASSES, LARGEST_DATA_GAP, SMALLEST_CAPACITY_GAP
from disk_plugin.taps import with_features

MAP = json.loads((Path(__file__).parents[1] / "examples" / "results" / "regime_map.json").read_text())


class Table(nn.Module):
    """A classifier that knows its answers: x (N,) int64 -> logits of answers[x]."""

    def __init__(self, answers, classes=4, wrap=lambda logits: logits):
        super().__init__()
        self.register_buffer("answers", torch.tensor(answers))
        self.classes, self.wrap, self.drop = classes, wrap, nn.Dropout(0.5)

    def forward(self, x):
        return self.wrap(self.drop(nn.functional.one_hot(self.answers[x], self.classes).float()))


# of the eight training samples the student has 5 right and the teacher 7, they agree on 4; held out 2 and 3 of 4
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
STUDENT = [0, 1, 2, 3, 0, 0, 0, 0, 0, 1, 0, 0]
TEACHER = [0, 1, 2, 3, 1, 1, 2, 3, 0, 1, 2, 0]
TRAIN = [(torch.arange(5), LABELS[:5]), (torch.arange(5, 8), LABELS[5:8])]
HELD_OUT = [(torch.arange(8, 12), LABELS[8:])]


def measured(student=None, teacher=None, train=TRAIN, held_out=HELD_OUT, **options):
    return capacity_gap(student or Table(STUDENT), teacher or Table(TEACHER), train, held_out, **options)


def gap(
    student_train=0.4,
    student_held_out=0.38,
    teacher_train=1.0,
    teacher_held_out=0.9,
    classes=100,
    features=48,
    convolutional=False,
):
    accuracies = student_train, student_held_out, teacher_train, teacher_held_out
    return CapacityGap(*accuracies, 0.4, 9000, 1000, classes, features, convolutional)


def refuses(error, *parts):
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


def test_an_accuracy_is_miscounted():
    found = measured()
    assert found[:7] == (5 / 8, 2 / 4, 7 / 8, 3 / 4, 4 / 8, 8, 4)
    assert (found.by_capacity, found.by_data, found.num_classes) == (2 / 8, 1 / 8, 4)


WRAPS = {
    "tuple of logits and features": lambda logits: (logits, torch.zeros(len(logits), 3)),
    "tuple of logits and dict": lambda logits: (logits, {"feats": [], "pooled_feat": None}),
    "object": lambda logits: SimpleNamespace(logits=logits),
    "dict": lambda logits: {"logits": logits},
    "half": lambda logits: logits.half(),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_models_kind_of_output_is_not_read(wrap):
    assert measured(Table(STUDENT, wrap=wrap), Table(TEACHER, wrap=wrap)) == measured()


@pytest.mark.parametrize(
    "train",
    [
        [(x, y, torch.arange(len(y))) for x, y in TRAIN],
        [[x, y.to(torch.uint8)] for x, y in TRAIN],
        iter(TRAIN),
        torch.utils.data.DataLoader([(i, LABELS[i].item()) for i in range(8)], batch_size=3, shuffle=True),
    ],
    ids=["index", "bytes", "iterator", "loader"],
)
def test_a_loaders_kind_of_batch_is_not_read(train):
    assert measured(train=train) == measured()


def test_ignored_samples_are_counted():
    for value in (-100, 7):
        target = torch.cat([LABELS[:5], torch.tensor([value] * 3)])
        found = measured(train=[(torch.arange(8), target)], ignore_index=value)
        assert found[:7] == (5 / 5, 2 / 4, 4 / 5, 3 / 4, 4 / 5, 5, 4)


def test_dense_positions_are_not_counted_one_by_one():
    def wrap(logits):
        return logits.reshape(-1, 2, 2, 4).movedim(-1, 1)

    train = [(torch.arange(8), LABELS[:8].reshape(2, 2, 2))]
    held_out = [(torch.arange(8, 12), LABELS[8:].reshape(1, 2, 2))]
    assert measured(Table(STUDENT, wrap=wrap), Table(TEACHER, wrap=wrap), train, held_out) == measured()


def test_more_batches_are_read_than_asked_for():
    assert measured(max_batches=1)[:7] == (5 / 5, 2 / 4, 4 / 5, 3 / 4, 4 / 5, 5, 4)


def test_models_are_left_in_another_mode_or_with_gradients():
    student, teacher = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.Linear(4, 4).eval()
    student[1].eval()
    before = [value.clone() for value in student.state_dict().values()]
    data = [(torch.randn(8, 4), torch.arange(8) % 4)]
    assert capacity_gap(student, teacher, data, list(data)) == capacity_gap(student, teacher, data, list(data))
    assert [module.training for module in student] == [True, False, True]
    assert student.training
    assert not teacher.training
    assert all(torch.equal(*pair) for pair in zip(before, student.state_dict().values(), strict=True))
    assert student[0].weight.grad is None


def test_the_width_of_the_last_layer_is_another():
    data = [(torch.randn(8, 6), torch.arange(8) % 4)]
    backwards = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    backwards._modules = dict(reversed(backwards._modules.items()))  # registered last, run first
    backwards.forward = lambda x: backwards[0](backwards[1](x))
    for student, width in (
        (backwards, 5),
        (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), 5),
        (with_features(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))), 5),
        (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8), nn.AvgPool1d(2)), None),  # not the last Linear's outputs
        (nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 4, 1), nn.Flatten()), None),
    ):
        hooks = sum(len(module._forward_hooks) for module in student.modules())
        found = capacity_gap(student, nn.Linear(6, 4), data, list(data))
        assert found.feature_dim == width
        assert f"last layer: {width or 'not found'}" in str(found)
        assert sum(len(module._forward_hooks) for module in student.modules()) == hooks


def test_convolutions_are_taken_for_patches():
    data = [(torch.randn(8, 3, 4, 4), torch.arange(8) % 4)]
    for convolution, found in ((nn.Conv2d(3, 16, 3), True), (nn.Conv2d(3, 16, 2, stride=2), False)):
        student = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
        measured = capacity_gap(student, teacher, data, list(data))
        assert (measured.convolutional, measured.feature_dim) == (found, 16)
        torch.compiler.reset()
        compiled = torch.compile(student.eval(), backend="eager")
        with torch.no_grad():
            compiled(data[0][0])
        assert capacity_gap(compiled, teacher, data, list(data)) == measured


# ---- the recommendation ----------------------------------------------------------------------------------------------

VERDICTS = {
    "capacity": (gap(), "DiSK", "DiSK; the student is limited by its capacity"),
    "augmented": (gap(student_held_out=0.45), "DiSK", "DiSK; the student is limited by its capacity"),
    "data": (gap(student_train=0.5, student_held_out=0.1), "KD", "KD; data limit the student"),
    "no gap": (gap(student_train=0.97, student_held_out=0.89), "KD", "KD; no clear difference is expected"),
    "untrained": (gap(student_train=0.012, student_held_out=0.01), "KD", "none yet: the student is near chance (1.0%"),
    "two classes": (gap(0.6, 0.6, classes=2), "KD", "KD; with 2 classes nothing is known"),
    "two classes, untrained": (gap(0.54, 0.5, classes=2), "KD", "none yet: the student is near chance (50.0% with 2"),
    "two classes, worse teacher": (gap(0.9, 0.9, classes=2), "KD", "KD, or another teacher: this one is not ahead"),
    "nine classes": (gap(classes=9), "KD", "KD; with 9 classes nothing is known"),
    "ten classes": (gap(classes=10), "DiSK", "DiSK; the student is limited by its capacity"),
    "convolutions": (gap(features=16, convolutional=True), "KD", "KD; no convolutional student with 16 features"),
    "few features": (gap(features=8, convolutional=True), "DiSK", "DiSK; the student is limited by its capacity"),
    "features unknown": (gap(features=None, convolutional=True), "KD", "KD unless its last layer, which was not found"),
    "features unknown, no convolution": (gap(features=None), "DiSK", "DiSK; the student is limited by its capacity"),
    "worse teacher": (gap(teacher_held_out=0.35), "KD", "KD, or another teacher: this one is not ahead"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_another_verdict_is_given(case):
    found, verdict, words = VERDICTS[case]
    assert found.verdict == verdict
    assert found.recommendation.startswith(words)
    assert f"Recommendation: {found.recommendation}." in str(found)


@pytest.mark.parametrize("case", VERDICTS)
def test_the_arguments_make_another_loss(case):
    """DiSK's takes off a share of the pull once training has come some way; KD's is plain distillation."""
    found, verdict, _ = VERDICTS[case]
    disk = DiSKLoss(GuideHead(10), **found.kwargs, temperature=2.0)
    disk.level.set_progress(1.0)
    student_logits, teacher_logits = 2 * torch.randn(2, 64, 10)
    for _ in range(40):
        terms = disk.terms(student_logits, teacher_logits, torch.arange(64) % 10)
    if verdict == "DiSK":
        assert terms.discount > 0.2
    else:
        settings = {"temperature": 2.0, "ce_weight": 0.0, "distill_weight": 1.0}
        expected = functional.kd_loss(student_logits, teacher_logits, torch.arange(64) % 10, **settings)
        assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_printed_figures_are_others():
    shown = str(measured())
    for part in ("8 and 4", "87.5%", "75.0%", "62.5%", "50.0%", "Gap by capacity +25.0 points, by data +12.5 ± 30.3"):
        assert part in shown
    assert "that has not converged" in shown


# ---- the map ---------------------------------------------------------------------------------------------------------


def test_the_thresholds_are_not_those_of_the_committed_map():
    found = rule.derive(rule.points(MAP))
    assert (found.capacity, found.data) == (SMALLEST_CAPACITY_GAP, LARGEST_DATA_GAP)
    assert min(cell["classes"] for row in MAP["problems"].values() for cell in row["cells"]) == FEWEST_CLASSES


# ---- what is refused -------------------------------------------------------------------------------------------------

NAN = Table(STUDENT, wrap=lambda logits: logits.where(torch.arange(len(logits))[:, None] > 0, torch.nan))
REFUSED = {
    "student": ({"student": len}, TypeError, "student must be a Module, got builtin"),
    "teacher": ({"teacher": lambda x: x}, TypeError, "teacher must be a Module, got function"),
    "classes": (
        {"teacher": Table(TEACHER, classes=5)},
        ValueError,
        "teacher must give logits of the student's shape (5, 4), got (5, 5)",
    ),
    "one class": (
        {"student": Table([0] * 12, 1), "teacher": Table([0] * 12, 1)},
        ValueError,
        "student's logits must have at least 2 classes",
    ),
    "output": ({"student": Table(STUDENT, wrap=str)}, TypeError, "the model must return logits as a Tensor"),
    "NaN, student": ({"student": NAN}, ValueError, "student must give logits without NaN, got NaN at 1 samples of tra"),
    "NaN, teacher": ({"teacher": NAN}, ValueError, "teacher must give logits without NaN, got NaN at 1 samples of tra"),
    "empty": ({"train": []}, ValueError, "train_loader must yield at least one sample that is not ignored, got none"),
    "all ignored": (
        {"held_out": [(torch.arange(4), torch.full((4,), -100))]},
        ValueError,
        "held_out_loader must yield at least one sample",
    ),
    "the same": ({"held_out": TRAIN}, ValueError, "held_out_loader must hold data that the student was not trained on"),
    "soft": (
        {"train": [(torch.arange(5), torch.rand(5, 4))]},
        TypeError,
        "target of train_loader must be class indices of shape (5,), got torch.float32 of shape (5, 4): accuracy needs",
    ),
    "shape": (
        {"held_out": [(torch.arange(4), LABELS[:3])]},
        ValueError,
        "target of held_out_loader must be class indices of shape (4,), got torch.int64 of shape (3,)",
    ),
    "outside": (
        {"train": [(torch.arange(2), torch.tensor([0, 4]))]},
        ValueError,
        "target must lie in [0, 4), the number of the models' classes, or be ignore_index=-100, got 4 from train_loa",
    ),
    "list target": ({"train": [(torch.arange(2), [0, 1])]}, TypeError, "target a Tensor of class indices", "got list"),
    "no pair": ({"train": [torch.arange(2)]}, TypeError, "train_loader must yield (x, target, ...), got Tensor"),
    "dict": ({"train": [{"x": 1}]}, TypeError, "train_loader must yield (x, target, ...), got dict"),
    "max_batches": ({"max_batches": 0}, ValueError, "max_batches must be >= 1, got 0"),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_argument_passed(case):
    options, error, *message = REFUSED[case]
    with refuses(error, *message):
        measured(**options)
