"""The guide's replay: the objective of the literal passes, a fair sample, resume, and nothing touched but the guide."""

import copy
import io
import os
from collections import Counter

import pytest
import torch
from processes import leave_group
from torch import distributed, nn
from torch import multiprocessing as mp

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.distributed import mean_over_processes
from disk_plugin.replay import GuideReplay, Reservoir
from disk_plugin.variants import VARIANTS

N, C, D = 24, 7, 3


def make_disk(guide=None, **settings):
    guide = GuideHead(C, D, hidden_dims=(8,)).double() if guide is None else guide
    return DiSKLoss(guide, **{"budget": 0.3, "multiplier": 7.0, "temperature": 2.0, **settings})


def make_replay(disk=None, *, optimizer=torch.optim.SGD, lr=0.1, dtype=torch.float64, **settings):
    disk = make_disk() if disk is None else disk
    return GuideReplay(disk, optimizer(disk.guide.parameters(), lr=lr), dtype=dtype, **settings)


def batch(n=N, positions=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(n, C, *positions, generator=g, dtype=torch.double) for _ in range(2))
    target = torch.randint(C, (n, *positions), generator=g)
    return student, teacher, target, torch.randn(n, D, generator=g, dtype=torch.double)


def part(data, index):
    return [value[index] for value in data]


def weights(disk):
    return torch.cat([parameter.detach().flatten() for parameter in disk.guide.parameters()])


def gradient(loss, disk):
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(disk.guide.parameters()))])


SETTINGS = {
    "default": {},
    "top-k": {"top_k": 3},
    "all by number": {"top_k": C, "variant": "official_cifar"},
    "plain gradient": {"guide_gradient_scale": None, "student_temperature": 3.0},
    "fitted": {"student_temperature": "fit"},
    "within": {"budget": 50.0},
    **{f"{name}, top-k": {"variant": name, "top_k": 2} for name in VARIANTS},
}


@pytest.mark.parametrize("positions", [(), (3, 2)], ids=["pooled", "dense"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_records_loss_is_that_of_the_batch_in_value_and_gradient(settings, positions):
    disk = make_disk(ignore_index=1, **settings)
    student, teacher, target, features = batch(positions=positions)
    weight = torch.rand(N, dtype=torch.double)
    replay = make_replay(disk)
    expected = disk.terms(student, teacher, target, features, sample_weight=weight).guide_loss
    replay.record(student, teacher, target, features, sample_weight=weight)
    assert len(replay) == (target != 1).sum() < target.numel()
    found = replay.guide_loss(torch.arange(len(replay)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(found, disk), gradient(expected, disk), rtol=1e-10, atol=1e-12)


def test_probabilities_as_targets_and_features_per_position_are_recorded():
    disk = make_disk(top_k=3)
    student, teacher, _, _ = batch(4, (5,))
    soft, features = torch.rand_like(student).softmax(1), torch.randn(4, D, 5, dtype=torch.double)
    replay = make_replay(disk)
    replay.record(student, teacher, soft, features)
    expected = disk.terms(student, teacher, soft, features).guide_loss
    torch.testing.assert_close(replay.guide_loss(torch.arange(20)), expected)


def test_multiplier_and_budget_are_those_in_force_at_the_replay():
    disk, data = make_disk(), batch()
    replay = make_replay(disk)
    replay.record(*data)
    disk.multiplier.fill_(0.5)
    disk.budget.fill_(0.01)
    torch.testing.assert_close(replay.guide_loss(torch.arange(N)), disk.terms(*data).guide_loss)


def test_a_record_of_another_dtype_is_refused_when_it_is_loaded():
    saved, fresh = make_replay(dtype=torch.float32), make_replay(dtype=torch.float16)
    saved.record(*batch())
    with pytest.raises(RuntimeError, match=r"expected a record of dtype torch.float16, got torch.float32"):
        fresh.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("target", ["all", "scaffolded"])
def test_at_a_held_discount_too_the_gradient_is_that_of_the_loss(target):
    rules = {"variant": VARIANTS["paper"]._replace(teacher_target=target), "top_k": 3}
    disk, data = make_disk(discount=0.4, budget=None, multiplier=None, **rules), batch()
    expected = torch.autograd.grad(disk.eval().terms(*data).guide_loss, [*disk.guide.parameters()])
    replay = make_replay(disk)
    replay.record(*data)
    found = torch.autograd.grad(replay.guide_loss(torch.arange(N)), [*disk.guide.parameters()])
    torch.testing.assert_close(found, expected)
    assert any(value.abs().max() > 1e-6 for value in found)


@pytest.mark.parametrize("variant", ["paper", "official_cifar"])
def test_on_a_fixed_student_the_replay_takes_the_steps_of_the_literal_passes(variant):
    torch.manual_seed(0)
    disk, data = make_disk(variant=variant, top_k=3), batch()
    literal = copy.deepcopy(disk)
    replay = make_replay(disk, batch_size=8, seed=5)
    order = torch.Generator()
    order.set_state(replay.generator.get_state())
    for first in (0, 10):  # in the order in which the student saw them
        replay.record(*part(data, slice(first, first + 10)))
    replay.record(*part(data, slice(20, N)))
    path, expected = [], []
    replay.optimizer.register_step_post_hook(lambda *_: path.append(weights(disk)))
    losses = replay.train_guide(passes=3)
    optimizer = torch.optim.SGD(literal.guide.parameters(), lr=0.1)
    for guide_pass in range(3):
        seen = []
        for index in torch.randperm(N, generator=order).split(8):
            loss = literal.terms(*part(data, index)).guide_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(weights(literal))
            seen.append(loss.item())
        assert losses[guide_pass] == pytest.approx(sum(seen) / 3, rel=1e-9)
    torch.testing.assert_close(torch.stack(path), torch.stack(expected), rtol=1e-9, atol=1e-10)


PERIODS = 100


def trained(data, disk, step, settings):
    """Train the guide on a frozen student; ``step`` makes a period's passes. Return the objective on all data."""
    replay = make_replay(disk, optimizer=torch.optim.Adam, lr=0.04, batch_size=20, **settings)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(replay.optimizer, PERIODS)
    for _ in range(PERIODS):
        step(disk, replay, data)
        decay.step()
    return disk.terms(*data).guide_loss.item()


def literal_pass(disk, replay, data):
    for index in torch.randperm(len(data[0])).split(replay.batch_size):
        literal_step(disk, replay.optimizer, part(data, index))


def recorded_pass(disk, replay, data):
    for index in torch.arange(len(data[0])).split(replay.batch_size):
        replay.record(*part(data, index))
    replay.train_guide(passes=1)


def test_literal_passes_and_replays_end_at_the_same_objective_on_a_frozen_student():
    data = batch(60, seed=3)
    start = make_disk(GuideHead(C, D, hidden_dims=(4,)).double(), budget=0.4)
    expected = trained(data, copy.deepcopy(start), literal_pass, {})
    gain = start.terms(*data).guide_loss.item() - expected
    assert gain > 1
    for settings in ({"seed": 1}, {"dtype": torch.float16}, {"capacity": 40}):
        found = trained(data, copy.deepcopy(start), recorded_pass, settings)
        assert found == pytest.approx(expected, abs=0.03 * gain), settings


def test_the_students_pass_reaches_the_student_alone():
    guide = GuideHead(C, D, hidden_dims=(8,), norm="batch").double()
    disk, (student, teacher, target, features) = make_disk(guide), batch()
    before = copy.deepcopy(guide.state_dict())
    replay = make_replay(disk)
    student.requires_grad_()
    loss = replay.student_loss(student, teacher, target, features)
    loss.backward()
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert guide.training
    guide.eval()
    expected = disk.terms(student, teacher, target, features).student_loss
    assert torch.equal(loss, expected)
    assert torch.equal(student.grad, torch.autograd.grad(expected, student)[0])
    assert len(replay) == N
    disk.eval()
    replay.student_loss(student, teacher, target, features)
    assert len(replay) == N  # validation is not recorded


def test_a_pass_trains_the_guide_in_training_mode_and_nothing_else():
    guide = GuideHead(C, D, hidden_dims=(8,), norm="batch").double()
    disk = make_disk(guide)
    replay = make_replay(disk, batch_size=8)
    for seed in range(3):
        replay.record(*batch(11, seed=seed))  # 33 positions: a batch of one would fail in BatchNorm
    disk.eval()
    statistics, random = guide.mlp[1].running_mean.clone(), torch.get_rng_state()
    buffers = [disk.multiplier.clone(), disk.budget.clone(), disk.epoch_statistics.clone()]
    start = weights(disk)
    replay.train_guide(passes=2)
    assert not torch.equal(weights(disk), start)
    assert not torch.equal(guide.mlp[1].running_mean, statistics)
    assert not guide.training
    assert torch.equal(torch.get_rng_state(), random)
    after = [disk.multiplier, disk.budget, disk.epoch_statistics]
    assert all(torch.equal(a, b) for a, b in zip(buffers, after, strict=True))
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert len(replay) == 0


def test_a_pass_is_split_evenly():
    replay, sizes = make_replay(batch_size=10), []
    replay.record(*batch(21))
    replay.disk.guide.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    replay.train_guide(passes=1)
    assert sizes == [7, 7, 7]


def test_every_arrival_is_held_with_the_same_probability():
    trials, capacity, rows = 600, 10, 37
    generator, held = torch.Generator().manual_seed(0), Counter()
    for _ in range(trials):
        reservoir = Reservoir(capacity, generator)
        for arrivals in torch.arange(rows).split(8):
            reservoir.add({"row": arrivals, "twice": 2 * arrivals})
        kept = reservoir.rows(torch.arange(capacity))
        assert len(set(kept["row"].tolist())) == capacity
        assert torch.equal(kept["twice"], 2 * kept["row"])
        held.update(kept["row"].tolist())
    expected = trials * capacity / rows
    chi2 = sum((held[row] - expected) ** 2 / (expected * (1 - capacity / rows)) for row in range(rows))
    assert chi2 < 67  # 99.8 % of chi2 with 36 degrees of freedom
    assert chi2 > 14  # a sample that is not random at all is too even


def test_up_to_the_capacity_all_are_held_in_order_and_clearing_forgets():
    reservoir = Reservoir(6, torch.Generator())
    reservoir.add({"row": torch.tensor([3, 1])})
    reservoir.add({"row": torch.tensor([4, 1, 5, 9])})
    assert reservoir.rows(torch.arange(6))["row"].tolist() == [3, 1, 4, 1, 5, 9]
    reservoir.clear()
    reservoir.add({"row": torch.tensor([2.0])})  # of another type: a new period begins with new memory
    assert len(reservoir) == 1
    with pytest.raises(ValueError, match=r"every batch must bring the columns .*float32.* got .*int64"):
        reservoir.add({"row": torch.tensor([1])})


@pytest.mark.parametrize("capacity", [1000, 30])
def test_an_interrupted_run_goes_on_bit_for_bit(capacity):
    def make():
        torch.manual_seed(1)
        replay = make_replay(make_disk(), optimizer=torch.optim.Adam, lr=0.01, capacity=capacity, batch_size=7, seed=2)
        return replay, DualScheduler(replay.disk, epochs=8)

    def epoch(replay, dual, half):
        for seed in half:
            replay.record(*batch(20, seed=seed))
        if half[-1] == 3:
            replay.train_guide(passes=2)
            dual.step()

    whole = make()
    for half in ((0, 1), (2, 3)) * 2:
        epoch(*whole, half)
    first = make()
    for half in ((0, 1), (2, 3), (0, 1)):  # stopped in the middle of a period of recording
        epoch(*first, half)
    file = io.BytesIO()
    torch.save(
        {"disk": first[0].disk.state_dict(), "replay": first[0].state_dict(), "dual": first[1].state_dict()}, file
    )
    file.seek(0)
    state, second = torch.load(file, weights_only=True), make()
    torch.rand(3)
    second[0].disk.load_state_dict(state["disk"])
    second[0].load_state_dict(state["replay"])
    second[1].load_state_dict(state["dual"])
    assert len(second[0]) == min(40, capacity)
    epoch(*second, (2, 3))
    assert torch.equal(weights(second[0].disk), weights(whole[0].disk))


def test_a_state_after_the_passes_holds_no_record():
    replay = make_replay()
    replay.record(*batch())
    assert len(replay.state_dict()["rows"]["target"]) == N
    replay.train_guide()
    assert replay.state_dict()["rows"] == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("use_logits", [True, False])
def test_bytes_per_sample_are_those_of_the_docstring(dtype, use_logits):
    disk = make_disk(GuideHead(C, D, use_logits=use_logits), top_k=2, variant="official_cifar")
    replay = make_replay(disk, dtype=dtype, capacity=11)
    replay.record(*batch(5))
    assert replay.bytes_per_sample == dtype.itemsize * (C * use_logits + D + 2 * 3) + 17
    assert sum(column.nbytes for column in replay._record._columns.values()) == 11 * replay.bytes_per_sample


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_types_store_and_float32_computes(dtype, tolerance):
    disk, data = make_disk(GuideHead(C, D)), batch(200)
    replay = make_replay(disk, dtype=dtype)
    replay.record(*data)
    found, expected = replay.guide_loss(torch.arange(200)), disk.terms(*data).guide_loss
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(gradient(found, disk), gradient(expected, disk), rtol=0.1, atol=5 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(dtype):
    disk = make_disk(GuideHead(C, D))
    student, teacher, target, features = batch()
    # log s and features beyond what float16 holds
    student, features = student * 1e6, features * 1e5
    replay = make_replay(disk, dtype=dtype)
    replay.record(student, teacher, target, features)
    assert len(replay) == N
    loss = replay.guide_loss(torch.arange(N))
    assert loss.isfinite()
    assert gradient(loss, disk).isfinite().all()


def test_positions_that_are_not_finite_are_left_out():
    disk, (student, teacher, target, features) = make_disk(), batch()
    student[1, 2] = torch.nan
    teacher[4, 0] = torch.inf
    features[7] = torch.inf
    replay = make_replay(disk)
    replay.record(student, teacher, target, features)
    rest = torch.tensor([i for i in range(N) if i not in (1, 4, 7)])
    expected = disk.terms(*part((student, teacher, target, features), rest)).guide_loss
    torch.testing.assert_close(replay.guide_loss(torch.arange(N - 3)), expected)


def test_autocast_changes_nothing():
    disk, data = (
        make_disk(GuideHead(C, D)),
        [value.float() if value.is_floating_point() else value for value in batch()],
    )
    plain, under = (make_replay(copy.deepcopy(disk), dtype=torch.float32) for _ in range(2))
    plain.record(*data)
    plain.train_guide()
    with torch.autocast("cpu", torch.bfloat16):
        under.record(*data)
        under.train_guide()
    assert torch.equal(weights(plain.disk), weights(under.disk))


def test_the_loop_of_the_readme_trains_both_and_keeps_to_its_players():
    torch.manual_seed(0)
    x, (_, teacher, target, features) = torch.randn(120, 5, dtype=torch.double), batch(120)
    student = nn.Linear(5, C).double()
    replay = make_replay(make_disk(multiplier=None), batch_size=30)
    dual = DualScheduler(replay.disk, epochs=3, multiplier=(5.0, 20.0), period=3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    path = []
    for _ in range(3):
        fixed = weights(replay.disk)
        for index in torch.randperm(120).split(40):
            loss = replay.student_loss(student(x[index]), teacher[index], target[index], features[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.equal(weights(replay.disk), fixed)
        student_weights = student.weight.detach().clone()
        dual.step()
        path.append(replay.train_guide(passes=3))
        assert not torch.equal(weights(replay.disk), fixed)
        assert torch.equal(student.weight, student_weights)
    assert all(losses[2] < losses[0] for losses in path)


def literal_step(disk, optimizer, data):
    optimizer.zero_grad()
    disk.terms(*data).guide_loss.backward()
    optimizer.step()


def process(rank, address, out):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.manual_seed(0)
    disk = make_disk(top_k=3, variant="official_cifar")
    disk.reduce_mean = mean_over_processes
    replay = make_replay(disk, batch_size=6)
    replay.record(*batch(12, seed=rank))
    replay.train_guide(passes=2)
    equal = weights(disk)
    replay.record(*batch(12 if rank else 7, seed=rank))  # the same number of steps all the same
    replay.train_guide(passes=1)
    torch.save((equal, weights(disk)), f"{out}{rank}")
    leave_group()


def test_two_processes_train_one_guide_as_one_process_does(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(process, (str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=2)
    (first, end), (second, other_end) = (torch.load(tmp_path / f"out{rank}", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert torch.equal(end, other_end)
    assert not torch.equal(first, end)
    torch.manual_seed(0)
    disk = make_disk(top_k=3, variant="official_cifar")
    optimizer, order = torch.optim.SGD(disk.guide.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    data = [batch(12, seed=rank) for rank in range(2)]
    for _ in range(2):
        for index in torch.randperm(12, generator=order).split(6):
            both = zip(*(part(own, index) for own in data), strict=True)
            literal_step(disk, optimizer, [torch.cat(pair) for pair in both])
    torch.testing.assert_close(first, weights(disk), rtol=1e-9, atol=1e-10)


class Elsewhere(nn.Module):
    """A guide of one's own, on the teacher's last map."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(D, 1, 2)

    def forward(self, teacher_logits, teacher_features):
        return self.layer(teacher_features).flatten(1).mean(1) + teacher_logits.mean(1)


def test_a_guide_of_ones_own_may_read_maps():
    disk, (student, teacher, target, _) = make_disk(Elsewhere().double()), batch()
    maps = torch.randn(N, D, 4, 4, dtype=torch.double)
    replay = make_replay(disk)
    replay.student_loss(student, teacher, target, maps)
    expected = disk.terms(student, teacher, target, maps).guide_loss
    torch.testing.assert_close(replay.guide_loss(torch.arange(N)), expected)


ERRORS = {
    "disk": (lambda d: GuideReplay(nn.Linear(1, 1), sgd(d)), TypeError, "disk must be a DiSKLoss .*got Linear"),
    "optimizer": (lambda d: GuideReplay(d, None), TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
    "foreign": (
        lambda d: GuideReplay(d, torch.optim.SGD([*d.guide.parameters(), nn.Parameter(torch.zeros(1))], 0.1)),
        ValueError,
        "must hold the guide's parameters and no others, got 1 others and 0 of the guide's missing",
    ),
    "missing": (
        lambda d: GuideReplay(d, torch.optim.SGD(list(d.guide.parameters())[1:], 0.1)),
        ValueError,
        "got 0 others and 1 of the guide's missing",
    ),
    "capacity": (lambda d: GuideReplay(d, sgd(d), capacity=0), ValueError, "capacity must be >= 1, got 0"),
    "batch size": (lambda d: GuideReplay(d, sgd(d), batch_size=2.0), TypeError, "batch_size must be an int, got float"),
    "seed": (lambda d: GuideReplay(d, sgd(d), seed=-1), ValueError, "seed must be >= 0, got -1"),
    "dtype": (lambda d: GuideReplay(d, sgd(d), dtype=torch.int8), ValueError, "dtype must be one of .*got torch.int8"),
    "passes": (lambda d: recorded(d).train_guide(0), ValueError, "passes must be >= 1, got 0"),
    "nothing": (
        lambda d: make_replay(d).train_guide(),
        RuntimeError,
        "train_guide.. needs recorded positions, got none",
    ),
    "unknown bytes": (lambda d: make_replay(d).bytes_per_sample, RuntimeError, "known from the first recorded batch"),
    "shapes": (
        lambda d: make_replay(d).record(torch.randn(2, C), torch.randn(2, C + 1), torch.zeros(2).long()),
        ValueError,
        "teacher_logits must have the shape of student_logits",
    ),
    "features": (
        lambda d: make_replay(d).record(*batch(2, (5,))[:3], torch.randn(2, D, 4)),
        ValueError,
        r"teacher_features must have shape \(2, D\) or \(2, D, 5\), got \(2, 3, 4\)",
    ),
    "fewer features": (
        lambda d: make_replay(d).record(*batch(2)[:3], torch.randn(1, D)),
        ValueError,
        r"teacher_features must have shape \(2, D\), got \(1, 3\)",
    ),
    "other columns": (
        lambda d: recorded(d).record(*batch(2)[:3]),
        ValueError,
        "every batch must bring the columns .*teacher_features",
    ),
    "features alone": (
        lambda d: make_replay(make_disk(GuideHead(C, D, use_logits=False))).record(*batch(2)[:3]),
        ValueError,
        "the guide reads features alone, got no teacher_features",
    ),
    "state": (lambda d: recorded(d).load_state_dict({"seen": 0}), RuntimeError, "expected a state with .*'generator'"),
    "capacity of the state": (
        lambda d: make_replay(d, capacity=9).load_state_dict(recorded(d).state_dict()),
        RuntimeError,
        "expected the record of a capacity of 9, got 24 of 24 positions",
    ),
}


def sgd(disk):
    return torch.optim.SGD(disk.guide.parameters(), lr=0.1)


def recorded(disk):
    replay = make_replay(disk)
    replay.record(*batch())
    return replay


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_what_is_wrong_is_refused_with_what_was_expected(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong(make_disk())
