"""reduction="sum": the sum over the positions that count, which no count divides."""

import copy

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, GuideHead, functional
from disk_plugin.variants import VARIANTS

N, C = 6, 5
LOSSES = ("loss", "student_loss", "guide_loss")


def batch(positions=(), ignored=True):
    student, teacher = (3 * torch.randn(N, C, *positions, dtype=torch.float64) for _ in range(2))
    target, guide = torch.randint(C, (N, *positions)), torch.randn(N, *positions, dtype=torch.float64)
    if ignored:
        target[1] = -100
    return student.requires_grad_(), teacher, target, guide.requires_grad_()


def gradients(terms, student, guide):
    to = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return [torch.autograd.grad(getattr(terms, name).sum(), (student, guide), **to) for name in LOSSES]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", [0.0, 100.0])
@pytest.mark.parametrize("positions", [(), (2, 3)])
@pytest.mark.parametrize("hold_discount", [False, True])
def test_sums_are_means_times_the_positions_that_count(variant, budget, positions, hold_discount):
    inputs = batch(positions)
    settings = {"variant": variant, "budget": budget, "top_k": 2, "hold_discount": hold_discount}
    summed, mean, none = (functional.disk_terms(*inputs, **settings, reduction=how) for how in ("sum", "mean", "none"))
    count = (inputs[2] != -100).sum()
    for name in set(summed._fields) - {"counted"}:
        torch.testing.assert_close(getattr(summed, name), count * getattr(mean, name))
        torch.testing.assert_close(getattr(summed, name), getattr(none, name).sum())
    assert summed.counted == mean.counted == count
    scaled = [[count * each for each in pair] for pair in gradients(mean, inputs[0], inputs[3])]
    torch.testing.assert_close(gradients(summed, inputs[0], inputs[3]), [tuple(pair) for pair in scaled])
    torch.testing.assert_close(none.sum(), summed)
    assert summed.sum() is summed


def test_the_sum_of_a_whole_with_nothing_that_counts_is_zero():
    student, teacher, target, guide = batch()
    inputs = (student, teacher, torch.full_like(target, -100), guide)
    terms = functional.disk_terms(*inputs, reduction="sum")
    assert all(value == 0 for value in terms)
    assert functional.kd_loss(*inputs[:3], reduction="sum") == 0
    assert all(gradient.abs().sum() == 0 for pair in gradients(terms, student, guide) for gradient in pair)


def test_sums_of_halves_add_up_where_the_hinge_does():
    student, teacher, target, guide = batch()
    halves = [slice(0, 2), slice(2, None)]
    parts = [
        functional.disk_terms(
            *(value[half] for value in (student, teacher, target, guide)), reduction="sum", budget=0.0
        )
        for half in halves
    ]
    whole = functional.disk_terms(student, teacher, target, guide, reduction="sum", budget=0.0)
    for name in whole._fields:
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


@pytest.mark.parametrize("form", [{}, {"discount": 0.3}, {"budget": 0.05}, {"student_temperature": "fit"}])
def test_the_module_counts_and_moves_as_it_does_for_the_mean(form):
    disk = DiSKLoss(GuideHead(C, hidden_dims=(4,)), **form).double()
    twin = copy.deepcopy(disk)
    for _ in range(3):
        student, teacher, target, _ = batch()
        summed = twin.terms(student, teacher, target, reduction="sum")
        torch.testing.assert_close(summed.loss, 5 * disk.terms(student, teacher, target).loss)
    torch.testing.assert_close(twin.state_dict(), disk.state_dict())
    assert disk.statistics().positions == 15


@pytest.mark.parametrize("weighed", [False, True])
def test_the_other_functions_sum_too(weighed):
    student, teacher, target, guide = batch()
    weight = torch.rand(N, dtype=torch.float64) if weighed else None
    calls = [
        lambda how: functional.kd_loss(student, teacher, target, sample_weight=weight, reduction=how),
        lambda how: functional.usage(student, target, guide, sample_weight=weight, reduction=how),
        lambda how: functional.scaffolded_kl(student, teacher, guide, reduction=how),
    ]
    for call in calls:
        torch.testing.assert_close(call("sum"), call("none").sum())


def test_the_cross_entropy_sums_as_torchs():
    student, teacher, target, _ = batch()
    found = functional.kd_loss(student, teacher, target, ce_weight=1.0, distill_weight=0.0, reduction="sum")
    torch.testing.assert_close(found, F.cross_entropy(student, target, reduction="sum"))


def test_it_compiles_in_one_graph():
    torch.compiler.reset()
    inputs = batch()
    compiled = torch.compile(functional.disk_terms, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, reduction="sum"), functional.disk_terms(*inputs, reduction="sum"))
