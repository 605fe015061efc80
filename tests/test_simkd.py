"""SimKD's projector and reused classifier, and its weighting by the guide."""

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.epoch_report import EpochReport
from disk_plugin.features.guided import FEATURE_WEIGHTS, feature_weights, guided_feature_terms
from disk_plugin.features.simkd import SimKD, check_classifier, pooled_classifier


def make(student_channels=3, teacher_channels=8, classes=5, size=(4, 4), **settings):
    classifier = pooled_classifier(nn.Linear(teacher_channels, classes))
    return SimKD(student_channels, teacher_channels, classifier, teacher_size=size, **settings)


def batch(student_size=(4, 4), teacher_size=(4, 4), samples=6):
    return torch.randn(samples, 3, *student_size), torch.randn(samples, 8, *teacher_size)


@pytest.mark.parametrize(("student_size", "teacher_size"), [((4, 4), (4, 4)), ((8, 8), (4, 4)), ((2, 2), (4, 4))])
def test_the_loss_is_the_mean_square_at_the_smaller_size_and_the_teachers_layer_predicts(student_size, teacher_size):
    simkd = make(size=teacher_size)
    student_map, teacher_map = batch(student_size, teacher_size)
    logits, error = simkd(student_map, teacher_map)
    smaller = min(student_size, teacher_size)
    projected = simkd.projector(adaptive_avg_pool2d(student_map, smaller))
    torch.testing.assert_close(error.mean(), mse_loss(projected, adaptive_avg_pool2d(teacher_map, smaller)))
    linear = simkd.classifier[-1]
    torch.testing.assert_close(logits, projected.mean((2, 3)) @ linear.weight.T + linear.bias)


def test_the_projector_is_a_bottleneck_of_three_convolutions():
    shapes = [tuple(p.shape) for p in make(factor=4).trainable_parameters() if p.ndim == 4]
    assert shapes == [(2, 3, 1, 1), (2, 2, 3, 3), (8, 2, 1, 1)]


def test_the_classifier_is_a_frozen_copy_and_inference_needs_no_teacher():
    linear = nn.Linear(8, 5)
    simkd = SimKD(3, 8, pooled_classifier(linear), teacher_size=(4, 4)).train()
    assert linear.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in simkd.classifier.parameters())
    assert not simkd.classifier.training
    student_map, teacher_map = batch()
    simkd.eval()
    assert torch.equal(simkd.predict(student_map), simkd(student_map, teacher_map).logits)


def test_no_gradient_reaches_the_teachers_map():
    student_map, teacher_map = batch()
    teacher_map.requires_grad_()
    make()(student_map.requires_grad_(), teacher_map).feature_error.sum().backward()
    assert teacher_map.grad is None


def test_a_half_precision_map_does_not_overflow():
    simkd = make().to(torch.bfloat16)
    student_map, teacher_map = (value.bfloat16() * 1e20 for value in batch())
    assert simkd(student_map, teacher_map).feature_error.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(student_channels=0), ValueError, "student_channels must be >= 1, got 0"),
        (lambda: make(factor=9), ValueError, "factor must be at most teacher_channels 8, got 9"),
        (lambda: make(size=4), ValueError, r"teacher_size must be \(height, width\), got 4"),
        (lambda: SimKD(3, 8, len, teacher_size=(4, 4)), TypeError, "classifier must be a Module .* got builtin"),
        (lambda: make()(torch.ones(2, 4, 4, 4), torch.ones(2, 8, 4, 4)), ValueError, r"\(N, 3, H, W\), got \(2, 4,"),
        (lambda: make()(torch.ones(2, 3, 4, 4), torch.ones(2, 8, 5, 5)), ValueError, r"teacher_map .*\(2, 8, 4, 4\)"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_classifier_that_does_not_make_the_logits_is_refused_with_the_reason():
    teacher_map, linear, norm = torch.randn(4, 8, 3, 3), nn.Linear(8, 5), nn.BatchNorm2d(8).eval()
    classifier = pooled_classifier(linear)
    norm.running_mean.uniform_(-1, 1)
    check_classifier(classifier, norm(teacher_map).relu(), classifier(norm(teacher_map).relu()))
    with pytest.raises(ValueError, match="does not reproduce the teacher's logits: relative difference"):
        check_classifier(classifier, teacher_map.relu(), classifier(norm(teacher_map).relu()))
    with pytest.raises(ValueError, match="reads 8 features, but the teacher's last map has 6 channels"):
        check_classifier(classifier, torch.randn(4, 6, 3, 3), torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"\(N, D, H, W\), got \(4, 8\)"):
        check_classifier(classifier, torch.randn(4, 8), torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"logits of shape \(4, 5\), the teacher \(4, 7\)"):
        check_classifier(classifier, teacher_map, torch.randn(4, 7))


def guided(weight, *, reduction="mean", error=None, **settings):
    """Terms of one seeded batch, and what received gradients."""
    torch.manual_seed(3)
    disk, simkd = DiSKLoss(GuideHead(5, 8), budget=0.01, ce_weight=0.1), make()
    student_map, teacher_map = batch()
    teacher_logits, target = torch.randn(6, 5), torch.arange(6) % 5
    logits, feature_error = simkd(student_map.requires_grad_(), teacher_map)
    feature_error = feature_error if error is None else feature_error * error
    features = teacher_map.mean((2, 3))
    arguments = (disk, logits, teacher_logits, target, features, feature_error)
    return guided_feature_terms(*arguments, weight=weight, reduction=reduction, **settings), disk, simkd, student_map


@pytest.mark.parametrize("weight", FEATURE_WEIGHTS)
def test_the_weights_are_what_their_names_say_and_the_sum_is_divided_by_n(weight):
    terms, *_ = guided(weight, reduction="none")
    plain, *_ = guided("uniform", reduction="none")
    g, discount = terms.disk.guide, terms.disk.discount
    w = {"one_minus_guide": 1 - g, "one_minus_discount": 1 - discount, "guide": g, "uniform": torch.ones(6)}[weight]
    assert torch.equal(feature_weights(terms.disk, weight), w)
    torch.testing.assert_close(terms.feature, w * plain.feature)
    mean, *_ = guided(weight, feature_weight=3.0)
    torch.testing.assert_close(mean.student_loss, 3 * (w * plain.feature).sum() / 6)
    torch.testing.assert_close(mean.loss, mean.student_loss + mean.guide_loss)


def test_uniform_weights_give_the_student_and_the_projector_simkds_gradient_bit_for_bit():
    terms, _, simkd, student_map = guided("uniform")
    terms.loss.backward()
    torch.manual_seed(3)
    DiSKLoss(GuideHead(5, 8))  # the same random numbers as in guided()
    alone = make()
    alone_map, teacher_map = batch()
    alone(alone_map.requires_grad_(), teacher_map).feature_error.mean().backward()
    assert torch.equal(student_map.grad, alone_map.grad)
    for ours, theirs in zip(simkd.trainable_parameters(), alone.trainable_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_guide_feels_scaffold_and_budget_and_not_the_features():
    gradients = []
    for error in (1.0, 1000.0):
        terms, disk, *_ = guided("one_minus_guide", error=error)
        terms.loss.backward()
        gradients.append([parameter.grad for parameter in disk.guide.parameters()])
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_guides_loss_leaves_the_student_alone_and_the_logit_loss_is_off_by_default():
    terms, _, simkd, student_map = guided("guide")
    terms.guide_loss.backward()
    assert student_map.grad is None or not student_map.grad.any()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in simkd.parameters())
    off, *_ = guided("guide")
    on, *_ = guided("guide", logit_loss=True)
    expected = off.student_loss + 0.1 * off.disk.ce + 0.9 * off.disk.distill
    torch.testing.assert_close(on.student_loss, expected)


@pytest.mark.parametrize("logit_loss", [False, True])
def test_what_is_logged_is_the_features_loss_and_the_divergence_where_they_train_the_student(logit_loss):
    settings = {"feature_weight": 3.0, "logit_loss": logit_loss}
    terms, *_ = guided("one_minus_guide", **settings)
    expected = 3 * terms.feature + logit_loss * (0.1 * terms.disk.ce + 0.9 * terms.disk.divergence)
    torch.testing.assert_close(terms.logged_loss, expected)
    assert not terms.logged_loss.requires_grad
    report = EpochReport()
    report.add(guided("one_minus_guide", reduction="none", **settings)[0])
    assert report.means()["logged_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert report.means()["divergence"] == pytest.approx(terms.disk.divergence.item(), rel=1e-6)


def test_bad_settings_are_refused():
    terms, *_ = guided("guide")
    with pytest.raises(ValueError, match=r"weight must be one of .*one_minus_guide.* got 'half'"):
        feature_weights(terms.disk, "half")
    with pytest.raises(TypeError, match="disk must be a DiSKLoss, got Linear"):
        guided_feature_terms(nn.Linear(1, 1), *[torch.ones(2, 2)] * 5)
    logits, disk = torch.randn(6, 5), DiSKLoss(GuideHead(5))
    with pytest.raises(ValueError, match=r"feature_error must have shape \(6,\), got \(\)"):
        guided_feature_terms(disk, logits, logits, torch.arange(6) % 5, None, torch.tensor(1.0))
    with pytest.raises(ValueError, match="feature_weight must be >= 0, got -1"):
        guided("guide", feature_weight=-1.0)
