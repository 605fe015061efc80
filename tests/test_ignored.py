"""Positions under ignore_index: they do not count in any mean, and nothing that stands there reaches a gradient."""

import math

import pytest
import torch
from torch import nn

from disk_plugin import DiSKLoss, GuideHead, functional
from disk_plugin.accumulation import AccumulatedBatch
from disk_plugin.epoch_report import EpochReport
from disk_plugin.features.guided import FEATURE_WEIGHTS, feature_weights, guided_feature_terms
from disk_plugin.features.simkd import SimKD, pooled_classifier
from disk_plugin.replay import GuideReplay
from disk_plugin.variants import VARIANTS

N, C, D, IGNORED = 8, 5, 3, -100
EXACT = {"rtol": 1e-10, "atol": 1e-12}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_position = pytest.mark.parametrize("positions", [(), (3,), (3, 2)], ids=["pooled", "1d", "2d"])
every_poison = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])


def batch(positions=(), keep=slice(None, None, 2), dtype=torch.float64):
    """Inputs by name, of which only ``keep`` counts, and what of them counts."""
    inputs = {
        "student_logits": 2 * torch.randn(N, C, *positions, dtype=dtype),
        "teacher_logits": 2 * torch.randn(N, C, *positions, dtype=dtype),
        "target": torch.full((N, *positions), IGNORED),
        "teacher_features": torch.randn(N, D, *positions, dtype=dtype),
        "sample_weight": torch.rand(N, *positions, dtype=dtype),
    }
    inputs["target"][keep] = torch.randint(C, inputs["target"][keep].shape)
    return inputs, {name: value[keep].clone() for name, value in inputs.items()}


def make_loss(**settings):
    torch.manual_seed(1)
    settings = {"budget": 0.05, "multiplier": 5.0, **settings}
    return DiSKLoss(GuideHead(C, D, hidden_dims=(4,)), **settings).double()


def evaluate(disk, inputs, **how):
    """Terms as means, the student's gradient and the guide's."""
    inputs = dict(inputs)
    student = inputs.pop("student_logits").clone().requires_grad_()
    terms = disk.terms(student, **inputs, **how).mean()
    gradients = torch.autograd.grad(terms.loss, (student, *disk.guide.parameters()))
    return terms, gradients[0], gradients[1:]


def assert_same_means(found, expected):
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), value, msg=name, **EXACT)


# ---- who divides -----------------------------------------------------------------------------------------------------


@every_variant
@every_position
def test_the_mean_of_terms_is_that_of_the_counted_positions_and_so_is_its_gradient(variant, positions):
    inputs, kept = batch(positions)
    disk = make_loss(variant=variant)
    expected, student, guide = evaluate(disk, kept, reduction="mean")
    for reduction in ("mean", "none"):
        found = evaluate(disk, inputs, reduction=reduction)
        assert_same_means(found[0], expected)
        torch.testing.assert_close(found[1][::2], student, **EXACT)
        assert not found[1][1::2].any()
        torch.testing.assert_close(found[2], guide, **EXACT)
    assert found[0].counted.item() == kept["target"].numel()
    assert found[0].mean() is found[0]


def test_the_mean_of_nothing_is_zero():
    inputs, _ = batch(keep=slice(0))
    terms = make_loss().terms(**inputs, reduction="none").mean()
    assert {value.item() for value in terms} == {0.0}


@pytest.mark.parametrize("weight", FEATURE_WEIGHTS)
@pytest.mark.parametrize("logit_loss", [False, True])
@every_position
def test_guided_features_are_those_of_the_counted_samples(weight, logit_loss, positions):
    inputs, kept = batch(positions)
    disk = make_loss()
    for each in (inputs, kept):
        del each["sample_weight"]
    error = torch.rand(N, *positions, dtype=torch.float64)
    how = {"weight": weight, "logit_loss": logit_loss, "feature_weight": 2.0}
    expected = guided_feature_terms(disk, **kept, feature_error=error[::2], **how)
    found = guided_feature_terms(disk, **inputs, feature_error=error, **how)
    none = guided_feature_terms(disk, **inputs, feature_error=error, reduction="none", **how)
    for terms in (found, none.mean()):
        for name in ("loss", "student_loss", "guide_loss", "feature"):
            torch.testing.assert_close(getattr(terms, name), getattr(expected, name), msg=name, **EXACT)
        assert_same_means(terms.disk, expected.disk)
    assert not none.feature[1::2].any()
    torch.testing.assert_close(found.guide_loss, disk.terms(**inputs).guide_loss, **EXACT)
    parameters = [*disk.guide.parameters()]
    ours, theirs = (torch.autograd.grad(each.loss, parameters) for each in (found, expected))
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_an_epoch_report_counts_what_is_not_ignored():
    inputs, kept = batch(keep=slice(2))
    inputs["target"][0], inputs["target"][1] = inputs["student_logits"][:2].argmax(1)
    inputs["target"][1] = (inputs["target"][1] + 1) % C  # one right, one wrong
    kept["target"] = inputs["target"][:2].clone()
    disk, ours, theirs = make_loss(), EpochReport(), EpochReport()
    ours.add(disk.terms(**inputs, reduction="none"))
    theirs.add(disk.terms(**kept, reduction="none"))
    assert ours.means() == pytest.approx(theirs.means(), rel=1e-12)
    terms = disk.terms(**kept, reduction="none")
    assert ours.means()["ce"] == pytest.approx(terms.ce.mean().item())
    assert ours.means()["guide_wrong"] == pytest.approx(terms.guide[1].item())
    assert ours.means()["student_accuracy"] == 0.5


def test_micro_batches_weighed_by_their_counted_positions_are_the_batch():
    inputs, _ = batch(keep=slice(3))
    disk = make_loss()
    whole, total = AccumulatedBatch(disk), (inputs["target"] != IGNORED).sum()
    student = inputs.pop("student_logits").clone().requires_grad_()
    for part in (slice(2), slice(2, N)):  # two counted positions, then one
        rest = {name: value[part] for name, value in inputs.items()}
        count = (rest["target"] != IGNORED).sum()
        (whole.add(student[part], **rest) * count / total).backward()
    expected = torch.autograd.grad(disk.terms(student, **inputs).student_loss, student)[0]
    torch.testing.assert_close(student.grad, expected, **EXACT)


# ---- what stands at an ignored position ------------------------------------------------------------------------------


def poisoned(inputs, name, poison):
    """Put a value where nothing counts; of logits and features into one entry or into all."""
    value = inputs[name].clone()
    value[1] = poison
    if name != "sample_weight":
        value[3, 0] = poison
    return inputs | {name: value}


@every_variant
@every_position
@every_poison
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "teacher_features", "sample_weight"])
def test_what_stands_at_an_ignored_position_reaches_neither_value_nor_gradient(variant, positions, poison, name):
    inputs, _ = batch(positions)
    disk = make_loss(variant=variant)
    expected = evaluate(disk, inputs)
    for reduction in ("mean", "none"):
        terms, student, guide = evaluate(disk, poisoned(inputs, name, poison), reduction=reduction)
        assert_same_means(terms, expected[0])
        torch.testing.assert_close(student, expected[1], **EXACT)
        torch.testing.assert_close(guide, expected[2], **EXACT)
    seen = disk.statistics()
    assert all(math.isfinite(value) for value in seen)


@every_poison
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "teacher_features", "sample_weight"])
def test_the_compiled_loss_masks_ignored_positions_too(poison, name):
    inputs, _ = batch()
    disk = make_loss(variant="official_imagenet", top_k=2)
    expected = evaluate(disk, inputs)
    disk.terms = torch.compile(disk.terms, backend="aot_eager", fullgraph=True)
    terms, student, guide = evaluate(disk, poisoned(inputs, name, poison))
    assert_same_means(terms, expected[0])
    torch.testing.assert_close(student, expected[1], **EXACT)
    torch.testing.assert_close(guide, expected[2], **EXACT)


@every_variant
@every_poison
def test_a_guide_logit_at_an_ignored_position_is_not_read(variant, poison):
    inputs, _ = batch()
    del inputs["teacher_features"]
    guide_logits = torch.randn(N, dtype=torch.float64)
    both = []
    for value in (0.5, poison):
        student, guide = inputs["student_logits"].clone().requires_grad_(), guide_logits.clone()
        guide[1] = value
        guide.requires_grad_()
        rest = {name: inputs[name] for name in ("teacher_logits", "target", "sample_weight")}
        terms = functional.disk_terms(student, guide_logits=guide, variant=variant, budget=0.05, **rest)
        both.append((*terms, *torch.autograd.grad(terms.loss, (student, guide))))
    torch.testing.assert_close(both[1], both[0], **EXACT)


@every_position
@every_poison
def test_plain_distillation_and_usage_mask_ignored_positions(positions, poison):
    inputs, _ = batch(positions)
    guide = torch.randn(N, *positions, dtype=torch.float64)
    for function in (
        lambda student, teacher, weight: functional.kd_loss(student, teacher, inputs["target"], sample_weight=weight),
        lambda student, _, weight: functional.usage(student, inputs["target"], guide, sample_weight=weight),
    ):
        results = []
        names = ("student_logits", "teacher_logits", "sample_weight")
        for dirty in (None, *names):
            values = inputs if dirty is None else poisoned(inputs, dirty, poison)
            student, teacher, weight = (values[name].clone() for name in names)
            loss = function(student.requires_grad_(), teacher, weight)
            results.append((loss.detach(), *torch.autograd.grad(loss, student)))
        for found in results[1:]:
            torch.testing.assert_close(found, results[0], **EXACT)


@every_poison
def test_a_feature_error_at_an_ignored_sample_is_not_read(poison):
    inputs, _ = batch()
    del inputs["sample_weight"]
    disk, results = make_loss(), []
    for value in (0.5, poison):
        error = torch.linspace(0, 1, N, dtype=torch.float64)
        error[1] = value
        error.requires_grad_()
        terms = guided_feature_terms(disk, **inputs, feature_error=error, logit_loss=True)
        results.append((terms.loss, *torch.autograd.grad(terms.loss, (error, *disk.guide.parameters()))))
    torch.testing.assert_close(results[1], results[0], **EXACT)


@every_poison
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "teacher_features", "sample_weight"])
def test_accumulation_and_replay_leave_the_guide_alive(poison, name):
    inputs, _ = batch()
    outcomes = []
    for dirty in (inputs, poisoned(inputs, name, poison)):
        disk = make_loss()
        whole = AccumulatedBatch(disk)
        student = whole.add(**dirty)
        terms = whole.terms()
        terms.guide_loss.backward()
        replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1))
        recorded = replay.student_loss(**dirty)
        losses = replay.train_guide(passes=2)
        outcomes.append([student, recorded, *terms, *(parameter.detach() for parameter in disk.guide.parameters())])
        assert all(math.isfinite(loss) for loss in losses)
    torch.testing.assert_close(outcomes[1], outcomes[0], **EXACT)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "teacher_features", "sample_weight"])
def test_a_nan_that_counts_still_propagates_to_the_loss(name):
    inputs, _ = batch()
    value = inputs[name].clone()
    value[0] = math.nan
    assert make_loss().terms(**inputs | {name: value}).loss.isnan()


# ---- what the guide reads beside dense targets -----------------------------------------------------------------------


class Pooling(nn.Module):
    """A guide of a user's own, that reads features of another layout than the target's."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(D, 1)

    def forward(self, teacher_logits, teacher_features):
        features = teacher_features.flatten(2).mean(2) if teacher_features.ndim > 2 else teacher_features
        each = self.last(features).squeeze(1)
        return each.reshape(-1, *[1] * (teacher_logits.ndim - 2)).expand(len(each), *teacher_logits.shape[2:])


@pytest.mark.parametrize("layout", [(), (4, 4), (1, 1), (3,)])
def test_features_of_another_layout_lose_the_samples_that_are_ignored_throughout(layout):
    inputs, kept = batch((8, 8))
    features = torch.randn(N, D, *layout, dtype=torch.float64)
    disk = DiSKLoss(Pooling().double(), budget=0.05)
    expected = evaluate(disk, kept | {"teacher_features": features[::2]})
    poison = features.clone()
    poison[1::2] = math.nan
    found = evaluate(disk, inputs | {"teacher_features": poison})
    assert_same_means(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2], **EXACT)


@every_poison
def test_a_teachers_map_at_an_ignored_sample_leaves_simkds_projector_alive(poison):
    results = []
    for dirty in (False, True):
        torch.manual_seed(3)
        simkd = SimKD(4, 6, pooled_classifier(nn.Linear(6, C)), teacher_size=(2, 2)).double()
        student_map, teacher_map = torch.randn(2, N, 6, 2, 2, dtype=torch.float64)
        if dirty:
            teacher_map[1] = poison
        inputs, _ = batch()
        inputs |= {"target": torch.where(torch.arange(N) == 1, IGNORED, torch.arange(N) % C)}
        del inputs["sample_weight"], inputs["student_logits"]
        logits, error = simkd(student_map[:, :4], teacher_map)
        assert error[1].isfinite() != dirty
        terms = guided_feature_terms(make_loss(), logits, **inputs, feature_error=error)
        results.append([terms.loss, *torch.autograd.grad(terms.loss, simkd.trainable_parameters())])
    torch.testing.assert_close(results[1], results[0], **EXACT)


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_terms_that_are_means_already_are_refused_where_samples_are_needed():
    terms = make_loss().terms(**batch()[0])
    with pytest.raises(ValueError, match='evaluated with reduction="none", one value per sample, got scalars'):
        EpochReport().add(terms)
    with pytest.raises(ValueError, match='evaluated with reduction="none"'):
        feature_weights(terms, "one_minus_guide")


def test_one_batch_that_overflowed_does_not_cost_the_epochs_report():
    disk, report, alone = make_loss(), EpochReport(), EpochReport()
    inputs, _ = batch()
    terms = disk.terms(**inputs, reduction="none")
    broken = disk.terms(**inputs | {"teacher_logits": torch.full((N, C), math.nan).double()}, reduction="none")
    report.add(terms)
    report.add(broken)
    alone.add(terms)
    assert report.means() == alone.means()
    lost = EpochReport()
    lost.add(broken)
    assert math.isnan(lost.means()["distill"])
