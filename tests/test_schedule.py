"""DualScheduler: the schedules against the oracle, the rules, the warning."""

import itertools
import math
import warnings

import pytest
import reference
import torch
from torch import nn

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.uniform import UniformGuide


def make_loss(**settings):
    """The paper's form, a budget in nats; how the scheduler drives the default is in test_level.py."""
    return DiSKLoss(GuideHead(5), **{"discount": None, **settings})


def train_batch(disk, bias=None):
    """One forward pass in training mode; with a bias, every guide logit is that."""
    if bias is not None:
        last = disk.guide.mlp[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(bias)
    disk(torch.randn(8, 5), torch.randn(8, 5), torch.randint(5, (8,)))


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 7, 8, 10, 30, 200])
@pytest.mark.parametrize("period", [None, 1, 3, 50])
def test_multiplier_equals_the_oracle_and_ends_exactly_at_its_largest(epochs, period):
    dual = DualScheduler(make_loss(), epochs=epochs, multiplier=(0.1, 0.7), period=period)
    for epoch in range(epochs + 3):
        assert dual(epoch)[0] == pytest.approx(reference.multiplier_at(epoch, epochs, 0.1, 0.7, period), rel=1e-12)
    assert dual(epochs)[0] == 0.7


def test_the_last_step_leaves_exactly_the_largest_multiplier_in_the_loss():
    for epochs in range(1, 40):
        disk = make_loss()
        dual = DualScheduler(disk, epochs=epochs, multiplier=(0.1, 0.7))
        for _ in range(epochs):
            dual.step()
        assert disk.multiplier.item() == 0.7


def test_the_last_period_rises_without_a_restart():
    dual = DualScheduler(make_loss(), epochs=23, period=5)
    values = [dual(epoch)[0] for epoch in range(24)]
    assert values[5] == values[10] == values[15] == 0.1
    assert all(later > earlier for earlier, later in itertools.pairwise(values[15:]))


def test_budget_equals_the_oracle():
    dual = DualScheduler(make_loss(), epochs=90, budget=(0.6, 0.4), budget_period=20, budget_decay=0.9)
    for epoch in range(91):
        assert dual(epoch)[1] == pytest.approx(reference.budget_at(epoch, 0.6, 0.4, 20, 0.9), rel=1e-12)
    assert dual(0)[1] == 0.6
    assert dual(20)[1] == pytest.approx(0.54)


def test_a_constant_budget_is_the_losss_own_or_the_one_given():
    assert DualScheduler(make_loss(budget=0.2), epochs=9)(7)[1] == 0.2
    assert DualScheduler(make_loss(budget=0.2), epochs=9, budget=0.7)(7)[1] == 0.7


def test_construction_and_step_write_in_place():
    disk = make_loss()
    multiplier, budget = disk.multiplier, disk.budget
    dual = DualScheduler(disk, epochs=8, budget=(0.6, 0.4))
    for epoch in range(9):
        assert disk.multiplier is multiplier
        assert disk.budget is budget
        assert (multiplier.item(), budget.item()) == dual(epoch)
        if epoch < 8:
            dual.step()


def test_calling_is_pure():
    disk = make_loss()
    dual = DualScheduler(disk, epochs=8)
    before = dual.state_dict(), disk.multiplier.item()
    assert dual(5) == dual(5)
    assert (dual.state_dict(), disk.multiplier.item()) == before


@pytest.mark.parametrize(("bias", "sign"), [(9.0, ">"), (-9.0, "<")])
def test_a_dead_guide_warns_once(bias, sign):
    disk = make_loss()
    dual = DualScheduler(disk, epochs=8)
    train_batch(disk, bias)
    with pytest.warns(UserWarning, match=f"guide is dead: g {sign}"):
        dual.step()
    train_batch(disk)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual.step()


class Fixed(nn.Module):
    """A guide with given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, teacher_logits, teacher_features=None):
        return self.logits


@pytest.mark.parametrize(("classes", "logit"), [(5, 4.0), (1000, -1.0)])
def test_a_guide_alike_on_all_samples_that_takes_nearly_all_off_is_dead(classes, logit):
    # with few classes g = .98, as the spring holds it; with many a g of .27 takes nearly all off
    logits = torch.full((8,), logit) + 0.005 * torch.randn(8)
    disk = DiSKLoss(Fixed(logits), discount=None, temperature=4.0)
    dual = DualScheduler(disk, epochs=8)
    disk(torch.randn(8, classes), torch.randn(8, classes), torch.randint(classes, (8,)))
    seen = disk.statistics()
    assert seen.guide_std == pytest.approx(logits.double().sigmoid().std(correction=0).item(), rel=1e-5)
    assert seen.guide_std < 0.002
    assert seen.guide_max < 0.99
    dual.step()  # at the smallest multiplier this is what the loss asks for
    disk(torch.randn(8, classes), torch.randn(8, classes), torch.randint(classes, (8,)))
    with pytest.warns(UserWarning, match="guide is dead: g is alike on all samples of epoch 1"):
        dual.step()


@pytest.mark.parametrize("logit", [-3.0, -6.0])
def test_one_g_for_all_that_takes_part_of_the_pull_off_is_no_dead_guide(logit):
    disk = DiSKLoss(Fixed(torch.full((8,), logit)), discount=None, temperature=1.0)
    dual = DualScheduler(disk, epochs=8)
    student = torch.randn(8, 100) - 5 * torch.nn.functional.one_hot(torch.arange(8), 100)
    disk(student, torch.randn(8, 100), torch.randint(100, (8,)))
    assert disk.statistics().guide_std < 1e-6
    assert 0.01 < disk.statistics().discount < 0.9
    dual.step()


def test_the_statistics_discount_is_the_epochs_mean_without_ignored_positions():
    disk = make_loss()
    target = torch.tensor([0, 1, -100, 2])
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    means = disk.terms(student, teacher, target).discount.item(), disk.terms(student[:1], teacher[:1], target[:1])
    assert disk.statistics().discount == pytest.approx((3 * means[0] + means[1].discount.item()) / 4, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_said_once_and_not_taken_for_a_dead_guide(value):
    disk = make_loss()
    dual = DualScheduler(disk, epochs=8)
    teacher = torch.randn(8, 5)
    teacher[0, 0] = value
    for _ in range(2):
        disk(torch.randn(8, 5), teacher, torch.randint(5, (8,)))
    train_batch(disk)
    assert all(math.isfinite(number) for number in disk.statistics())
    assert disk.epoch_batches.tolist() == [3, 2]
    with pytest.warns(UserWarning, match="loss was NaN or inf in 2 of the 3 batches of epoch 0") as caught:
        dual.step()
    assert len(caught) == 1
    disk(torch.randn(8, 5), teacher, torch.randint(5, (8,)))
    dual.step()  # once


def test_a_single_overflow_in_an_epoch_is_no_news():
    disk = make_loss()
    dual = DualScheduler(disk, epochs=8)
    disk(torch.full((8, 5), torch.inf), torch.randn(8, 5), torch.randint(5, (8,)))
    for _ in range(3):
        train_batch(disk)
    dual.step()


def test_a_rule_that_needs_statistics_says_that_all_batches_were_nan():
    disk = make_loss()
    dual = DualScheduler(disk, epochs=8, rule="ascent")
    disk(torch.full((8, 5), torch.nan), torch.randn(8, 5), torch.randint(5, (8,)))
    with (
        pytest.warns(UserWarning, match="NaN or inf in 1 of the 1 batches"),
        pytest.raises(RuntimeError, match="got 1, all with a NaN or inf loss"),
    ):
        dual.step()


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_a_run_too_short_for_its_periods_is_said_at_once_with_the_cure(epochs):
    with pytest.warns(UserWarning, match=rf"in the {epochs} steps .* at most 0.1 of 50.*multiplier=\(50, 50\) keeps"):
        DualScheduler(make_loss(), epochs=epochs)
    if epochs > 2:
        DualScheduler(make_loss(), epochs=epochs, period=epochs)
    DualScheduler(make_loss(), epochs=epochs, multiplier=(50.0, 50.0))
    DualScheduler(make_loss(), epochs=epochs, rule="ascent")


@pytest.mark.parametrize("guide", [UniformGuide((1.0, 0.0)), UniformGuide(discount="auto"), GuideHead(5)])
def test_a_schedule_of_one_step_leaves_what_follows_the_progress_at_its_start_and_says_so(guide):
    with pytest.warns(UserWarning, match="in a schedule of epochs=1 training ends at progress 0, where") as told:
        dual = DualScheduler(DiSKLoss(guide), epochs=1)
    assert dual.note == str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DualScheduler(DiSKLoss(guide), epochs=2)
        for constant in (UniformGuide(0.3), UniformGuide(discount=0.3)):
            DualScheduler(DiSKLoss(constant), epochs=1)
        DualScheduler(DiSKLoss(GuideHead(5), discount=0.3), epochs=1)


def test_a_budget_that_never_falls_is_told():
    with pytest.warns(UserWarning, match=r"budget stays at 0.6 and never falls to 0.1: .* as budget_period"):
        dual = DualScheduler(make_loss(), epochs=4, budget=(0.6, 0.1), multiplier=(5.0, 5.0))
    assert {dual(epoch)[1] for epoch in range(5)} == {0.6}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fallen = DualScheduler(make_loss(), epochs=4, budget=(0.6, 0.1), budget_period=4, multiplier=(5.0, 5.0))
        DualScheduler(make_loss(), epochs=4, budget=0.6, multiplier=(5.0, 5.0))
    assert fallen(3)[1] < 0.2


def test_statistics_of_an_older_checkpoint_are_taken_up():
    disk = make_loss()
    train_batch(disk)
    usage, positions, *_, smallest, largest = disk.epoch_statistics.tolist()
    old = torch.tensor([usage, positions, smallest, largest], dtype=torch.float64)
    state = disk.state_dict() | {"epoch_statistics": old}
    fresh = make_loss()
    dual = DualScheduler(fresh, epochs=8, rule="ascent")
    fresh.load_state_dict(state)
    assert fresh.statistics()[:4] == disk.statistics()[:4]
    assert state["epoch_statistics"].shape == (4,)
    dual.step()
    old[2:] = torch.tensor([0.001, 0.005])  # of many classes: nothing tells what that took off
    fresh.load_state_dict(state)
    train_batch(fresh, -6.0)
    dual.step()


def test_a_living_guide_and_an_epoch_without_batches_do_not_warn():
    disk = make_loss()
    dual = DualScheduler(disk, epochs=8)
    dual.step()
    train_batch(disk, 9.0)
    train_batch(disk, 0.0)  # one batch of the epoch has g = 1/2
    dual.step()


def test_adaptive_doubles_the_largest_multiplier_at_the_end_of_a_violated_period():
    disk = make_loss(budget=0.0)
    dual = DualScheduler(disk, epochs=8, multiplier=(1.0, 50.0), period=2, rule="adaptive", multiplier_cap=150.0)
    largest = []
    for _ in range(8):
        train_batch(disk)
        dual.step()
        largest.append(dual.multiplier_max)
    assert largest == [50.0, 100.0, 100.0, 150.0, 150.0, 150.0, 150.0, 150.0]
    assert disk.multiplier.item() == 150.0


def test_adaptive_leaves_the_bounds_where_the_budget_holds():
    disk = make_loss(budget=100.0)
    dual = DualScheduler(disk, epochs=8, rule="adaptive")
    for _ in range(8):
        train_batch(disk)
        dual.step()
    assert dual.multiplier_max == 50.0


@pytest.mark.parametrize(("budget", "up"), [(0.0, True), (100.0, False)])
def test_ascent_follows_the_sign_of_the_violation(budget, up):
    disk = make_loss(budget=budget)
    dual = DualScheduler(disk, epochs=4, multiplier=(1.0, 50.0), rule="ascent", ascent_rate=2.0)
    assert disk.multiplier.item() == 1.0
    train_batch(disk)
    expected = 1.0 + 2.0 * (disk.statistics().usage - budget)
    dual.step()
    assert disk.multiplier.item() == pytest.approx(max(expected, 1.0))
    assert (disk.multiplier.item() > 1.0) is up


def test_ascent_falls_again_when_the_budget_holds():
    disk = make_loss(budget=0.0)
    dual = DualScheduler(disk, epochs=4, multiplier=(0.0, 50.0), budget=(1000.0, 0.0), budget_period=2, rule="ascent")
    train_batch(disk)
    dual._ascent_multiplier = 40.0
    dual.step()
    assert disk.multiplier.item() == 0.0


def test_statistics_are_the_epochs_mean_and_start_anew():
    disk = make_loss()
    dual = DualScheduler(disk, epochs=8)
    sizes, usages = (4, 8), []
    for size in sizes:
        terms = disk.terms(torch.randn(size, 5), torch.randn(size, 5), torch.randint(5, (size,)))
        usages.append(terms.usage.item())
    seen = disk.statistics()
    assert seen.positions == 12
    assert seen.usage == pytest.approx((4 * usages[0] + 8 * usages[1]) / 12, rel=1e-6)
    assert 0 < seen.guide_min <= seen.guide_max < 1
    assert disk.epoch_batches.tolist() == [2, 0]
    dual.step()
    assert disk.statistics().positions == 0
    disk.eval()
    train_batch(disk)
    assert disk.statistics().positions == 0
