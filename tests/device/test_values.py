"""Loss, terms, gradients and what moves with the batches, in float32 on a device, against float64 on the CPU."""

import pytest
import torch
from torch import nn
from twins import C, D, N, assert_close, batch, evaluated, moved, twins

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.accumulation import AccumulatedBatch
from disk_plugin.epoch_report import EpochReport
from disk_plugin.taps import with_features
from disk_plugin.uniform import UniformGuide

SETTINGS = {
    "default": {},
    "temperature 1": {"temperature": 1.0},
    "two temperatures": {"temperature": 1.5, "student_temperature": 2.5},
    "top-3": {"top_k": 3},
    "paper": {"top_k": 3, "guide_gradient_scale": None, "multiplier": 7.0, "budget": 0.05},
    "official_cifar": {"top_k": 3, "variant": "official_cifar", "guide_gradient_scale": None},
    "official_imagenet": {"top_k": 3, "variant": "official_imagenet", "guide_gradient_scale": None},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@every_setting
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_terms_and_gradients_are_the_cpus(device, settings, reduction):
    torch.manual_seed(2)
    guide = torch.randn(N, dtype=torch.double)
    results = []
    for where, dtype in (("cpu", torch.double), (device, torch.float32)):
        student, teacher, target, logits = moved((*batch()[:3], guide), where, dtype)
        logits.requires_grad_()

        def terms_of(student, teacher=teacher, target=target, logits=logits):
            return functional.disk_terms(student, teacher, target, logits, reduction=reduction, **settings)

        results.append(evaluated(terms_of, student, parameters=[logits]))
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected)
    assert results[1][1][0].device.type == device


@every_setting
def test_module_guide_gradients_and_statistics_are_the_cpus(device, settings):
    expected, found = twins(lambda: DiSKLoss(GuideHead(C, D), **settings), device)
    both = []
    for disk, values in ((expected, batch()), (found, moved(batch(), device))):
        student, teacher, target, features = values
        both.append(evaluated(disk.terms, student, teacher, target, features, parameters=list(disk.parameters())))
        disk.terms(student, teacher, target, features)
    for one, other in zip(both[1], both[0], strict=True):
        assert_close(one, other, 1e-4)
    assert_close([found.epoch_statistics], [expected.epoch_statistics], 1e-4)
    assert found.epoch_statistics.dtype == torch.double


def test_kd_loss_is_the_cpus(device):
    expected, found = (
        functional.kd_loss(*values[:3], temperature=2.0, ce_weight=0.1, distill_weight=0.9)
        for values in (batch(ignored=False), moved(batch(ignored=False), device))
    )
    assert_close([found], [expected])


@pytest.mark.parametrize(
    "guide", [{"value": 0.03}, {"value": (1.0, 0.0), "over": 0.5}, {"discount": 0.4}, {"discount": "auto", "over": 0.1}]
)
def test_a_uniform_guide_moves_as_on_the_cpu(device, guide):
    expected, found = twins(lambda: DiSKLoss(UniformGuide(**guide), multiplier=0.0), device)
    for disk, where, dtype in ((expected, "cpu", torch.double), (found, device, torch.float32)):
        dual = DualScheduler(disk, epochs=4)
        for epoch in range(3):
            for step in range(4):
                disk(*moved(batch(10 * epoch + step)[:3], where, dtype))
            dual.step()
    assert_close(found.guide.buffers(), expected.guide.buffers(), 1e-4)
    assert found.guide.log_guide.device.type == device


def test_a_fitted_student_temperature_moves_as_on_the_cpu(device):
    expected, found = twins(lambda: DiSKLoss(GuideHead(C, D), student_temperature="fit"), device)
    for step in range(6):
        expected(*batch(step))
        found(*moved(batch(step), device))
    moved_by = (expected.fitted_student_temperature - 4.0).abs().item()
    assert moved_by > 1e-3
    assert_close([found.fitted_student_temperature], [expected.fitted_student_temperature], 1e-4 * moved_by)


def test_training_with_a_schedule_ends_where_the_cpus_does(device):
    expected, found = twins(lambda: nn.ModuleList([nn.Linear(D, C), DiSKLoss(GuideHead(C, D))]), device)
    for modules, where, dtype in ((expected, "cpu", torch.double), (found, device, torch.float32)):
        student, disk = modules
        dual = DualScheduler(disk, epochs=4, multiplier=(20.0, 50.0), budget=(0.2, 0.1), budget_period=4)
        optimizer = torch.optim.SGD(modules.parameters(), lr=0.05, momentum=0.9)
        for epoch in range(4):
            for step in range(3):
                _, teacher, target, features = moved(batch(10 * epoch + step), where, dtype)
                loss = disk(student(features), teacher, target, features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            dual.step()
    assert_close(found.parameters(), expected.parameters(), 1e-3)


def test_two_halves_accumulated_are_the_whole_batch(device):
    _, disk = twins(lambda: DiSKLoss(GuideHead(C, D), budget=0.05, multiplier=7.0), device)
    values = moved(batch(ignored=False), device)
    whole = evaluated(disk.terms, *values, parameters=list(disk.parameters()))
    accumulated, gradients = AccumulatedBatch(disk), []
    for index in torch.arange(N, device=device).split(N // 2 + 1):
        student, *others = (value[index] for value in values)
        student = student.clone().requires_grad_()
        loss = accumulated.add(student, *others) * len(index) / N
        gradients.append(torch.autograd.grad(loss, [student])[0])
    assert_close([torch.cat(gradients)], [whole[1][0].cpu()], 1e-4)


def test_an_epochs_report_is_the_cpus(device):
    expected, found = twins(lambda: DiSKLoss(GuideHead(C, D)), device)
    reports = [EpochReport(), EpochReport()]
    for report, disk, values in zip(reports, (expected, found), (batch(), moved(batch(), device)), strict=True):
        report.add(disk.terms(*values, reduction="none"))
    assert reports[1].means() == pytest.approx(reports[0].means(), rel=1e-4, nan_ok=True)


def test_features_are_read_on_the_device(device):
    plain, teacher = twins(lambda: nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, C)), device)
    tapped, inputs = with_features(teacher.eval()), batch()[3]
    logits, features = tapped(inputs.float().to(device))
    assert features.device.type == device
    assert_close([logits, features], [plain(inputs), plain[:2](inputs)])


@pytest.mark.parametrize("scale", [1e4, 1e2])
def test_extreme_logits_keep_finite_gradients(device, scale):
    _, disk = twins(lambda: DiSKLoss(GuideHead(C, D)), device)
    student, teacher, target, features = moved(batch(), device)
    (terms, gradients) = evaluated(disk.terms, scale * student, scale * teacher, target, features)
    assert all(value.isfinite().all() for value in (*terms, *gradients))
