"""What else a loss goes through: torch.func, a moving average, the meta device, settings that are tensors."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from disk_plugin import DiSKLoss, GuideHead, functional

N, C = 6, 5


def make_loss(**settings):
    torch.manual_seed(1)
    return DiSKLoss(GuideHead(C, hidden_dims=(4,)), **{"budget": 0.05, **settings}).double()


def batch():
    student, teacher = (torch.randn(N, C, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.arange(N) % C


def eager_gradient(disk, student, *rest):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(disk(student, *rest), student)[0]


# ---- torch.func, in training mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 2])
def test_grad_of_the_loss_in_training_mode_is_autograds(top_k):
    disk, inputs = make_loss(top_k=top_k), batch()
    found = grad(lambda student: disk(student, *inputs[1:]))(inputs[0])
    torch.testing.assert_close(found, eager_gradient(disk, *inputs))


def test_the_guides_gradient_by_functional_call_is_autograds():
    disk, inputs = make_loss(), batch()
    parameters, buffers = dict(disk.named_parameters()), dict(disk.named_buffers())
    found = grad(lambda parameters: functional_call(disk, (parameters, buffers), inputs))(parameters)
    expected = torch.autograd.grad(disk(*inputs), [*parameters.values()])
    torch.testing.assert_close([*found.values()], [*expected])


def test_vmap_over_students_is_one_loss_each_with_ignored_positions_too():
    disk, (_, teacher, target) = make_loss(), batch()
    students = torch.randn(3, N, C, dtype=torch.float64)
    for ignored in (False, True):
        target = torch.where(torch.arange(N) < 2, -100, target) if ignored else target
        found = vmap(lambda student: disk(student, teacher, target))(students)  # noqa: B023
        torch.testing.assert_close(found, torch.stack([disk(student, teacher, target) for student in students]))


def test_gradients_per_sample_are_those_of_batches_of_one():
    disk, inputs = make_loss(), batch()
    found = vmap(grad(lambda *sample: disk(*(value[None] for value in sample))))(*inputs)
    for i in range(N):
        expected = eager_gradient(disk, *(value[i : i + 1] for value in inputs))
        torch.testing.assert_close(found[i : i + 1], expected)


def test_statistics_are_counted_where_the_transform_is_given_the_buffers():
    disk, inputs = make_loss(), batch()
    before = disk.epoch_batches[0].item()
    grad(lambda student: disk(student, *inputs[1:]))(inputs[0])
    assert disk.epoch_batches[0].item() == before
    stacked = {name: torch.stack([value] * 2) for name, value in disk.named_buffers()}
    parameters = dict(disk.named_parameters())
    vmap(lambda buffers: functional_call(disk, (parameters, buffers), inputs))(stacked)
    assert stacked["epoch_statistics"][:, 1].tolist() == [N, N]


@pytest.mark.parametrize("transform", [grad, vmap])
def test_a_fitted_temperature_that_could_not_move_is_refused_with_the_cure(transform):
    disk, (student, teacher, target) = make_loss(student_temperature="fit"), batch()
    student = student if transform is grad else torch.stack([student] * 2)
    call = transform(lambda student: disk(student, teacher, target))
    with pytest.raises(RuntimeError, match=r"student_temperature=.fit. updates a buffer .* call disk.eval\(\)"):
        call(student)
    disk.eval()
    call(student)


# ---- a moving average, the meta device -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_a_moving_average_has_the_averaged_guide_and_todays_multiplier(how):
    disk, inputs = make_loss(), batch()
    averaged = AveragedModel(disk, **how)
    guides = []
    for step in range(3):
        with torch.no_grad():
            for parameter in disk.parameters():
                parameter.add_(0.1)
            disk.multiplier.fill_(step)
        disk(*inputs)
        averaged.update_parameters(disk)
        guides.append(copy.deepcopy(disk.guide.state_dict()))
    weights = (0.81, 0.09, 0.1) if how else (1 / 3, 1 / 3, 1 / 3)
    expected = make_loss(multiplier=2.0)
    mean = {name: sum(w * guide[name] for w, guide in zip(weights, guides, strict=True)) for name in guides[0]}
    expected.guide.load_state_dict(mean)
    torch.testing.assert_close(averaged.eval()(*inputs), expected.eval()(*inputs))
    assert averaged.module.statistics() == disk.statistics()


@pytest.mark.parametrize("student_temperature", [None, "fit"])
def test_a_loss_built_on_the_meta_device_has_the_constructors_state(student_temperature):
    settings = {"multiplier": 7.0, "budget": 0.2, "student_temperature": student_temperature}
    with torch.device("meta"):
        disk = DiSKLoss(GuideHead(C), **settings)
    assert disk.multiplier.is_meta
    disk.to_empty(device="cpu")
    expected = dict(DiSKLoss(GuideHead(C), **settings).named_buffers())
    torch.testing.assert_close(dict(disk.named_buffers()), expected, rtol=0, atol=0)
    for module in disk.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    disk.multiplier.fill_(9.0)
    disk.to(torch.float32)  # no move off the meta device: state stays
    assert disk.multiplier.item() == 9.0


def test_weights_assigned_to_a_meta_loss_bring_their_state():
    state = make_loss(multiplier=7.0).state_dict()
    with torch.device("meta"):
        disk = DiSKLoss(GuideHead(C, hidden_dims=(4,)), discount=None)
    disk.load_state_dict(state, assign=True)
    assert disk.multiplier.item() == 7.0


# ---- settings that are tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["temperature", "student_temperature", "ce_weight", "distill_weight"])
def test_a_learnable_setting_is_refused(name):
    learnable = nn.Parameter(torch.tensor(2.0))
    student, teacher, target = batch()
    message = f"{name} must be a constant, got a tensor that requires grad"
    with pytest.raises(ValueError, match=message):
        DiSKLoss(GuideHead(C), **{name: learnable})
    with pytest.raises(ValueError, match=message):
        functional.disk_terms(student, teacher, target, student[:, 0], **{name: learnable})
    with pytest.raises(ValueError, match=message):
        functional.kd_loss(student, teacher, target, **{name: learnable})


@pytest.mark.parametrize("name", ["multiplier", "budget", "guide_gradient_scale"])
def test_a_learnable_setting_of_the_guide_is_refused(name):
    student, teacher, target = batch()
    with pytest.raises(ValueError, match=f"{name} must be a constant"):
        functional.disk_terms(student, teacher, target, student[:, 0], **{name: nn.Parameter(torch.tensor(2.0))})
    if name != "guide_gradient_scale":
        functional.disk_terms(student, teacher, target, student[:, 0], **{name: torch.tensor(2.0)})
