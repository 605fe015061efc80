"""DualScheduler: the schedules against the oracle, the rules, the warning."""

import itertools
import warnings

import pytest
import reference
import torch

from disk_plugin import DiSKLoss, DualScheduler, GuideHead


def make_loss(**settings):
    return DiSKLoss(GuideHead(5), **settings)


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
    dual = DualScheduler(disk, epochs=4, period=1, rule="adaptive")
    for _ in range(4):
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
    dual = DualScheduler(disk, epochs=4)
    sizes, usages = (4, 8), []
    for size in sizes:
        terms = disk.terms(torch.randn(size, 5), torch.randn(size, 5), torch.randint(5, (size,)))
        usages.append(terms.usage.item())
    seen = disk.statistics()
    assert seen.positions == 12
    assert seen.usage == pytest.approx((4 * usages[0] + 8 * usages[1]) / 12, rel=1e-6)
    assert 0 < seen.guide_min <= seen.guide_max < 1
    dual.step()
    assert disk.statistics().positions == 0
    disk.eval()
    train_batch(disk)
    assert disk.statistics().positions == 0
