"""The default form: the guide ranks, the loss sets the level of g so that the mean discount meets its target."""

import copy
import io
import math
import warnings

import pytest
import torch
from processes import leave_group
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional, presets
from disk_plugin.accumulation import AccumulatedBatch
from disk_plugin.distributed import attach
from disk_plugin.level import DiscountLevel, GuideLevel
from disk_plugin.replay import GuideReplay
from disk_plugin.uniform import UniformGuide
from disk_plugin.variants import VARIANTS

N, C, D = 32, 6, 3


def make_loss(discount="auto", **settings):
    torch.manual_seed(3)
    return DiSKLoss(GuideHead(C, D, hidden_dims=(8,)), discount=discount, **settings).double()


def batch(positions=(), n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher, features = (
        2 * torch.randn(n, width, *positions, generator=generator, dtype=torch.float64) for width in (C, C, D)
    )
    return student, teacher, torch.randint(C, (n, *positions), generator=generator), features


def guide_gradient(disk, *inputs, **how):
    return torch.autograd.grad(disk.terms(*inputs, **how).guide_loss, [*disk.parameters()])


# ---- what the guide is asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_guide_feels_the_divergence_at_a_given_mean_discount(variant, top_k):
    """By autograd, from the definitions: the gradient of the divergence plus a multiple of that of the discount."""
    student, teacher, target, _ = batch()
    logits = torch.randn(N, dtype=torch.float64).sub(2).requires_grad_()
    settings = {"temperature": 2.0, "student_temperature": 3.0, "top_k": top_k, "variant": variant}
    terms = functional.disk_terms(student, teacher, target, logits, multiplier=0.0, hold_discount=True, **settings)
    found = torch.autograd.grad(terms.guide_loss, logits)[0]

    rules = VARIANTS[variant]
    mask = torch.ones_like(teacher, dtype=torch.bool)
    if top_k:
        mask = torch.zeros_like(mask).scatter(1, teacher.topk(top_k, 1).indices, True)
        mask = mask.scatter(1, target[:, None], True) if rules.scaffold_label else mask
    soft = teacher / 2
    if rules.teacher_target == "scaffolded" and top_k:
        soft = torch.where(mask, soft, teacher.amin(1, keepdim=True))
    t = soft.softmax(1) * (mask if rules.teacher_target == "scaffolded" else 1)
    s = (student / 3).softmax(1)
    g = logits.sigmoid()[:, None] * mask
    to_divergence = torch.autograd.grad(-(t * (s + g).log()).sum(1).mean(), logits)[0]
    g = logits.sigmoid()[:, None] * mask
    to_taken = torch.autograd.grad(((t * g / (s + g)).sum(1) / t.sum(1)).mean(), logits)[0]
    price = -to_divergence.sum() / to_taken.sum()
    torch.testing.assert_close(found, to_divergence + price * to_taken)
    assert found.sum().abs() < 1e-12 < found.abs().max()


def test_the_student_and_the_value_feel_nothing_of_it():
    student, teacher, target, features = batch()
    disk = make_loss(0.4, temperature=3.0)
    placed = disk.level.place(disk.guide_logits(teacher, features))
    expected = functional.disk_terms(
        student.requires_grad_(),
        teacher,
        target,
        placed,
        ce_weight=0.0,
        distill_weight=1.0,
        temperature=3.0,
        multiplier=0.0,
        hold_discount=True,
    )
    found = disk.terms(student, teacher, target, features)
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), msg=name)
    each = [torch.autograd.grad(loss, student)[0] for loss in (found.loss, expected.student_loss)]
    torch.testing.assert_close(*each)
    assert found.loss == found.student_loss


def test_where_the_discount_is_held_no_budget_is_read_nor_shared_over_processes():
    student, teacher, target, _ = batch()
    logits, asked = torch.zeros(N, dtype=torch.float64), []

    def mean(value):
        asked.append(value)
        return value

    held = functional.disk_terms(student, teacher, target, logits, hold_discount=True, reduce_mean=mean)
    assert len(asked) == 1  # gain and cost of a discount, of which the price is made
    free = functional.disk_terms(student, teacher, target, logits, hold_discount=True, multiplier=0.0)
    torch.testing.assert_close(held._asdict(), free._asdict(), rtol=0, atol=0)
    bounded = functional.disk_terms(student, teacher, target, logits)
    assert bounded.loss > held.loss


@pytest.mark.parametrize("top_k", [None, 2])
def test_ignored_positions_and_weights_count_as_in_a_batch_without_them(top_k):
    student, teacher, target, features = batch((3,), n=8)
    target[2, 1] = target[5] = -100
    weight = torch.rand(8, 3, dtype=torch.float64) + 0.5
    kept = target != -100

    def flat(value):
        return value.movedim(1, -1)[kept] if value.ndim == 3 else value[kept]

    wide, narrow = make_loss(0.4, top_k=top_k), make_loss(0.4, top_k=top_k)
    student[5], teacher[5] = math.nan, math.inf
    dense = guide_gradient(wide, student, teacher, target, features, sample_weight=weight)
    plain = guide_gradient(narrow, *map(flat, (student, teacher, target, features)), sample_weight=flat(weight))
    torch.testing.assert_close(dense, plain)
    torch.testing.assert_close(wide.level.state_dict(), narrow.level.state_dict())


@pytest.mark.parametrize("discount", [0.1, 0.4, 0.7])
def test_the_discount_is_met_while_the_guide_learns_to_rank(discount):
    disk = make_loss(discount)
    optimizer = torch.optim.SGD(disk.parameters(), lr=0.1, momentum=0.9)
    for _ in range(200):
        terms = disk.terms(*batch(n=256), reduction="none")
        optimizer.zero_grad()
        terms.mean().loss.backward()
        optimizer.step()
    assert terms.discount.mean().item() == pytest.approx(discount, abs=0.01)
    odds = terms.guide / (1 - terms.guide)
    assert odds.max() / odds.min() <= math.exp(1.0) * (1 + 1e-9)  # e^-.5 to e^.5 around the level
    assert odds.max() / odds.min() > 1.3
    uniform = DiSKLoss(UniformGuide(discount=discount)).double()
    for _ in range(100):
        even = uniform.terms(*batch(n=256)[:3])
    # what the guide is asked for: less divergence at the same discount
    assert terms.distill.mean() < even.distill - 1e-3


class Offset(nn.Module):
    """A guide whose logits are far from 0."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, teacher_logits, teacher_features=None):
        return self.logits


def test_a_guide_far_off_its_centre_still_ranks():
    student, teacher, target, _ = batch()
    disk = DiSKLoss(Offset(7.0 + 0.1 * torch.randn(N)), discount=0.4)
    for _ in range(3):
        disk(student, teacher, target)
    terms = disk.terms(student, teacher, target, reduction="none")
    assert terms.guide.std() > 0.02 * terms.guide.mean()
    assert guide_gradient(disk, student, teacher, target)[0].abs().min() > 0


# ---- the automatic target -------------------------------------------------------------------------------------------


def level_after(agreements, epochs, **how):
    """A level that saw one batch of each agreement per epoch; returns its target after each."""
    level, targets = DiscountLevel("auto", **how), []
    for epoch, agreement in enumerate(agreements):
        level.step(*(torch.tensor(value, dtype=torch.float64) for value in (0.1, 0.1, agreement, 0.0)))
        level.set_progress((epoch + 1) / epochs)
        targets.append(level.target.item())
    return level, targets


def test_the_target_is_what_the_student_fails_to_follow_ramped_in_and_bounded():
    _, targets = level_after([0.7] * 10, 10, share=0.8, over=0.5)
    assert targets == pytest.approx([0.8 * 0.3 * min(2 * (e + 1) / 10, 1) for e in range(10)])
    _, targets = level_after([0.0] * 4, 4)
    assert targets[-1] == 0.5


def test_the_target_waits_while_the_student_still_learns_to_follow():
    # agreement .4 at first; the running mean moves .3 of the way to .6: .46, a tenth of the disagreement gone
    _, targets = level_after([0.4, 0.6], 2, share=0.8)
    assert targets[1] == pytest.approx(0.8 * (1 - 0.46) * (1 - 6 * 0.1))
    _, targets = level_after([0.4, 0.8], 2)  # .52: a fifth
    assert targets[1] == 0.0


def test_progress_that_is_said_again_changes_nothing():
    level, _ = level_after([0.4, 0.7], 4)
    level.step(*(torch.tensor(value, dtype=torch.float64) for value in (0.1, 0.1, 0.9, 0.0)))  # within an epoch
    before = copy.deepcopy(level.state_dict())
    level.set_progress(0.5)
    torch.testing.assert_close(level.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("order", ["loss, schedule", "schedule, loss", "loss, then the schedule is made"])
def test_a_resume_within_an_epoch_is_the_same_in_every_order(order):
    disk = make_loss()
    dual = DualScheduler(disk, epochs=4)
    for seed in range(5):
        disk(*batch(seed=seed))
        dual.step() if seed == 2 else None
    saved, state = copy.deepcopy(disk.state_dict()), dual.state_dict()
    fresh = make_loss()
    early = None if "made" in order else DualScheduler(fresh, epochs=4)
    if order == "schedule, loss":
        early.load_state_dict(state)
    fresh.load_state_dict(saved)
    if order != "schedule, loss":
        (early or DualScheduler(fresh, epochs=4)).load_state_dict(state)
    torch.testing.assert_close(fresh.level.state_dict(), disk.level.state_dict(), rtol=0, atol=0)
    assert 0 < disk.level.gate < 1
    torch.testing.assert_close(fresh(*batch(seed=9)), disk(*batch(seed=9)), rtol=0, atol=0)


@pytest.mark.parametrize("batches", [0, 60])
def test_before_the_first_epoch_ends_it_is_plain_distillation(batches):
    disk = make_loss(temperature=2.0)
    DualScheduler(disk, epochs=5)
    for _ in range(batches):
        disk(*batch())
    student, teacher, target, features = batch()
    plain = functional.kd_loss(student, teacher, target, temperature=2.0, ce_weight=0.0, distill_weight=1.0)
    torch.testing.assert_close(disk(student, teacher, target, features), plain, rtol=1e-4, atol=1e-4)


def test_the_scheduler_tells_how_far_training_has_come():
    disk = make_loss()
    dual = DualScheduler(disk, epochs=4)
    seen = [disk.level.progress.item()]
    for _ in range(4):
        disk(*batch())
        dual.step()
        seen.append(disk.level.progress.item())
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert dual(3) == (0.0, 0.3)
    assert dual.note is None


@pytest.mark.parametrize("make", [make_loss, lambda: DiSKLoss(UniformGuide((1.0, 0.0))).double()])
def test_a_loss_that_nobody_tells_the_progress_says_so_once(make):
    disk = make()

    def train():
        for _ in range(150):
            disk(*batch(n=4))

    with pytest.warns(UserWarning, match="100 training batches without a DualScheduler") as told:
        train()
    assert len(told) == 1
    train()
    assert told[0].filename == __file__


@pytest.mark.parametrize("make", [make_loss, lambda: make_loss(0.4), lambda: DiSKLoss(UniformGuide(0.1)).double()])
def test_one_that_is_told_or_need_not_be_does_not(make):
    disk = make()
    if make is make_loss:
        DualScheduler(disk, epochs=4)
    for _ in range(120):
        disk(*batch(n=4))


@pytest.mark.parametrize("kind", ["guide", "uniform"])
@pytest.mark.parametrize("change", [{}, {"scaffold_label": True}, {"teacher_target": "scaffolded"}])
def test_with_top_k_the_target_is_of_the_pull_on_the_classes_that_receive_g(kind, change):
    """Else one above the mass of these classes drives g to 1, and the student off exactly these classes."""
    student, teacher, target, features = batch()
    settings = {"top_k": 2, "temperature": 6.0, "variant": VARIANTS["paper"]._replace(**change)}
    uniform = DiSKLoss(UniformGuide(discount=0.6), **settings).double()
    disk = make_loss(0.6, **settings) if kind == "guide" else uniform
    for _ in range(60):
        terms = disk.terms(student, teacher, target, features)
    mask = functional.scaffold_mask(teacher, 2, target if "scaffold_label" in change else None)
    reach = ((teacher / 6).softmax(1) * mask).sum(1).mean() if "teacher_target" not in change else 1.0
    assert terms.discount / reach == pytest.approx(0.6, abs=1e-6)
    assert "teacher_target" in change or reach < 0.6
    assert terms.guide < 0.9


def test_a_target_that_g_cannot_reach_is_told():
    disk, student = DiSKLoss(GuideHead(C), discount=0.9).double(), 30 * torch.eye(C, dtype=torch.float64)
    dual = DualScheduler(disk, epochs=3)
    for _ in range(80):  # even g = 1 takes half of the pull at most where the student is certain
        disk(student, student, torch.arange(C))
    with pytest.warns(UserWarning, match=r"g is 1, its largest, and the mean discount is 0\.4\d* .* target of 0\.9"):
        dual.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual.step()


def test_a_rank_of_which_all_targets_are_ignored_leaves_the_level_to_the_others():
    alone, ranks, (student, teacher, target, features) = make_loss(0.4), make_loss(0.4), batch()
    seen = []
    alone.reduce_mean = lambda value: seen.append(value) or value
    alone(student, teacher, target, features)
    theirs = iter(seen)  # what the other rank gives to the same all-reduces
    ranks.reduce_mean = lambda value: (value + next(theirs)) / 2
    ranks(student, teacher, torch.full_like(target, -100), features)
    torch.testing.assert_close(ranks.level.state_dict(), alone.level.state_dict())
    assert ranks.level.centre != 0


def test_a_discount_of_0_stays_0_whatever_is_loaded():
    state = make_loss(0.4).state_dict()
    disk = make_loss(0)
    disk.load_state_dict(state)
    assert disk.eval().terms(*batch()).guide == 0


def test_weights_can_be_assigned_to_a_loss_on_the_meta_device():
    state = make_loss().float().state_dict()
    with torch.device("meta"):
        disk = DiSKLoss(GuideHead(C, D, hidden_dims=(8,)))
    disk.load_state_dict(state, assign=True)
    student, teacher, target, features = batch()
    disk(student.float(), teacher.float(), target, features.float())
    assert disk.epoch_batches.tolist() == [1, 0]


# ---- which form a loss takes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"multiplier": 50.0},
        {"budget": 0.1},
        {"discount": None},
        presets.PAPER["loss"],
        {"variant": "official_cifar"},
        {"variant": "official_imagenet", "top_k": 3},
        {"variant": VARIANTS["paper"]._replace(guide_penalty=0.9)},
    ],
)
def test_a_budget_a_multiplier_or_rules_for_them_ask_for_the_papers_form(settings):
    disk = DiSKLoss(GuideHead(C), **settings)
    assert disk.level is None
    assert not any("level" in name for name in disk.state_dict())
    assert disk.multiplier.item() == 50.0


def test_a_variant_without_rules_for_a_budget_keeps_the_discount():
    for change in ({"teacher_target": "scaffolded"}, {"scaffold_label": True}):
        assert DiSKLoss(GuideHead(C), variant=VARIANTS["paper"]._replace(**change)).level.discount == "auto"
    assert DiSKLoss(GuideHead(C), discount=0.3, variant="official_cifar").level.discount == 0.3


def test_a_discount_that_is_asked_for_reads_no_rule_of_a_budget():
    student, teacher, target, features = batch()
    rules = VARIANTS["official_cifar"]
    plain = VARIANTS["paper"]._replace(scaffold_label=True, teacher_target="scaffolded")
    found, expected = (make_loss(0.4, top_k=3, variant=each) for each in (rules, plain))
    each = [disk.terms(student, teacher, target, features).loss for disk in (found, expected)]
    torch.testing.assert_close(*each, rtol=0, atol=0)


@pytest.mark.parametrize(
    "how", [{"multiplier": (0.1, 50.0)}, {"period": 2}, {"budget": 0.2}, {"budget_period": 3}, {"rule": "ascent"}]
)
def test_so_does_what_the_scheduler_is_given(how):
    disk = DiSKLoss(GuideHead(C))
    assert isinstance(disk.level, GuideLevel)
    dual = DualScheduler(disk, epochs=8, **how)
    assert (dual.multiplier_min, dual.multiplier_max) == (0.1, 50.0)
    built_so = DiSKLoss(GuideHead(C), discount=None)
    DualScheduler(built_so, epochs=8, **how, **({} if "multiplier" in how else {"multiplier": (0.1, 50.0)}))
    assert repr(disk) == repr(built_so)


def test_repr_shows_the_discount_and_its_current_target():
    assert "discount=0.4, target=0.4" in repr(make_loss(0.4))
    disk = make_loss()
    dual = DualScheduler(disk, epochs=4)
    assert "discount='auto', share=0.8, over=0.2, target=0.0" in repr(disk)
    disk(*batch())
    dual.step()
    target = disk.level.target.item()
    assert 0 < target <= 0.5
    assert f"target={target:.4g}" in repr(disk)


def test_a_multiplier_given_to_the_loss_stays_unless_bounds_are_asked_for():
    disk = DiSKLoss(GuideHead(C), multiplier=1000.0, budget=0.02)
    dual = DualScheduler(disk, epochs=8)
    for _ in range(3):
        dual.step()
    assert disk.multiplier.item() == 1000.0
    assert DualScheduler(disk, epochs=8, budget=(0.5, 0.1)).multiplier_max == 1000.0
    for how in ({"multiplier": (0.1, 50.0)}, {"rule": "ascent"}, {"period": 2}):
        disk = DiSKLoss(GuideHead(C), multiplier=1000.0)
        with pytest.warns(
            UserWarning, match=r"given multiplier=1000, which the schedule's bounds \(0.1, 50.0\) over"
        ) as w:
            DualScheduler(disk, epochs=8, **how)
        assert w[0].filename == __file__
    disk = DiSKLoss(GuideHead(C), budget=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DualScheduler(disk, epochs=8).multiplier_max == 50.0
        DualScheduler(disk, epochs=8, multiplier=(1.0, 5.0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_loss(0.4, budget=0.1), ValueError, "discount=0.4 and budget=0.1 both bound g"),
        (lambda: make_loss(0.4, multiplier=5.0), ValueError, "discount=0.4 and multiplier=5.0 both bound g"),
        (lambda: make_loss(1.0), ValueError, "discount must be <= 0.99, got 1.0"),
        (lambda: make_loss(-0.1), ValueError, "discount must be >= 0"),
        (lambda: make_loss("much"), ValueError, r"discount must be one of \['auto'\], got 'much'"),
        (lambda: make_loss(True), TypeError, "discount must be a number, got bool"),
        (lambda: make_loss(multiplier=-1.0), ValueError, "multiplier must be >= 0"),
        (lambda: DiSKLoss(UniformGuide(0.1), discount=0.4), ValueError, "left out beside a UniformGuide"),
        (
            lambda: DualScheduler(make_loss(0.4), epochs=4, period=2),
            ValueError,
            "the loss was given discount=0.4, which has no period",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- parts, processes, replay, state --------------------------------------------------------------------------------


def test_micro_batches_give_the_whole_batchs_gradient_and_move_the_level_once():
    disk, twin = make_loss(0.4), make_loss(0.4)
    inputs = batch()
    expected = guide_gradient(twin, *inputs)
    whole = AccumulatedBatch(disk)
    for part in (slice(10), slice(10, N)):
        student, teacher, target, features = (value[part] for value in inputs)
        whole.add(student.requires_grad_(), teacher, target, features).backward()
    found = torch.autograd.grad(whole.terms().guide_loss, [*disk.parameters()])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(disk.level.state_dict(), twin.level.state_dict())


def test_on_a_record_the_guide_trains_as_on_the_batch():
    disk = make_loss(0.4, top_k=3)
    replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1), dtype=torch.float64)
    disk.level.log_guide.fill_(-2.0)
    student, teacher, target, features = batch()
    replay.record(student, teacher, target, features)
    disk.eval()
    terms = disk.terms(student, teacher, target, features)
    expected = terms.guide_loss, torch.autograd.grad(terms.guide_loss, [*disk.parameters()])
    loss = replay.guide_loss(torch.arange(N))
    torch.testing.assert_close((loss, torch.autograd.grad(loss, [*disk.parameters()])), expected)
    disk.train()
    before = copy.deepcopy(disk.level.state_dict())
    replay.train_guide(passes=2)
    torch.testing.assert_close(disk.level.state_dict(), before, rtol=0, atol=0)  # the student's batches move it


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    disk = make_loss()
    disk.level.set_progress(0.5)
    attach(disk)
    for seed in range(3):
        disk.zero_grad()
        disk(*(value[rank::2] for value in batch(seed=seed))).backward()
    state = {"level": disk.level.state_dict(), "gradients": [parameter.grad for parameter in disk.parameters()]}
    torch.save(state, f"{folder}/{rank}")
    leave_group()


def test_two_processes_have_one_level_and_one_gradient_those_of_the_whole_batch(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    single = make_loss()
    single.level.set_progress(0.5)
    for seed in range(3):
        single.zero_grad()
        single(*batch(seed=seed)).backward()
    expected = {"level": dict(single.level.state_dict()), "gradients": [p.grad for p in single.parameters()]}
    for found in both:
        torch.testing.assert_close({**found, "level": dict(found["level"])}, expected)
    torch.testing.assert_close(both[0]["level"], both[1]["level"], rtol=0, atol=0)


@pytest.mark.parametrize("dual_first", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(dual_first):
    def fresh():
        disk = make_loss()
        return disk, DualScheduler(disk, epochs=8), torch.optim.SGD(disk.parameters(), lr=0.1, momentum=0.9)

    def run(parts, epochs):
        disk, dual, optimizer = parts
        for epoch in epochs:
            for step in range(3):
                optimizer.zero_grad()
                student, *others = batch(seed=10 * epoch + step)
                disk(student.requires_grad_(), *others).backward()
                optimizer.step()
            dual.step()

    whole, half, resumed = fresh(), fresh(), fresh()
    run(whole, range(8))
    run(half, range(4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in half], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for index in (1, 0, 2) if dual_first else (0, 1, 2):
        resumed[index].load_state_dict(states[index])
    run(resumed, range(4, 8))
    torch.testing.assert_close(resumed[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)
    assert whole[0].level.log_guide != half[0].level.log_guide


def test_it_compiles_without_graph_breaks():
    torch.compiler.reset()
    disk = make_loss(0.4)
    twin = copy.deepcopy(disk)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        torch.testing.assert_close(compiled(*batch(seed=seed)), disk(*batch(seed=seed)))
    torch.testing.assert_close(dict(twin.level.state_dict()), dict(disk.level.state_dict()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_moves_no_level(value):
    disk = make_loss(0.4)
    disk(*batch())
    before = copy.deepcopy(disk.level.state_dict())
    student, teacher, target, features = batch()
    teacher[0, 0] = value
    disk(student, teacher, target, features)
    torch.testing.assert_close(disk.level.state_dict(), before, rtol=0, atol=0)


def test_evaluation_moves_nothing():
    disk = make_loss(0.4)
    disk(*batch())
    before = copy.deepcopy(disk.level.state_dict())
    disk.eval()
    disk(*batch(seed=1))
    torch.testing.assert_close(disk.level.state_dict(), before, rtol=0, atol=0)


def test_the_level_keeps_its_digits_through_a_cast_and_starts_anew_off_the_meta_device():
    assert make_loss().to(torch.bfloat16).level.log_guide.item() == -16.0
    assert make_loss(0.4).to(torch.bfloat16).level.log_guide.item() == math.log(0.01)
    with torch.device("meta"):
        bare = DiSKLoss(GuideHead(C))
        assert "GuideLevel" in repr(bare)
    bare.to_empty(device="cpu")
    fresh = DiSKLoss(GuideHead(C))
    for name in ("multiplier", "budget", "epoch_statistics"):
        torch.testing.assert_close(getattr(bare, name), getattr(fresh, name), rtol=0, atol=0)
    found, expected = (dict(loss.level.state_dict()) for loss in (bare, fresh))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_under_torch_func_it_is_refused_in_training_mode_with_the_cure():
    student, teacher, target, features = batch()
    disk = make_loss()
    with pytest.raises(RuntimeError, match=r"updates a buffer in training mode.*call disk.eval\(\)"):
        torch.func.grad(lambda student: disk(student, teacher, target, features))(student)
    disk.eval()
    torch.func.grad(lambda student: disk(student, teacher, target, features))(student)


@pytest.mark.parametrize("kind", ["guide", "uniform"])
@pytest.mark.parametrize("variant", ["paper", "official_imagenet"])
def test_a_discount_of_0_is_plain_distillation_from_the_first_batch_on(kind, variant):
    settings = {"temperature": 3.0, "ce_weight": 0.1, "variant": variant, "top_k": C}
    disk = make_loss(0, **settings) if kind == "guide" else DiSKLoss(UniformGuide(discount=0), **settings).double()
    dual = DualScheduler(disk, epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for seed in range(2):
                student, teacher, target, features = batch(seed=seed)
                student.requires_grad_()
                terms = disk.terms(student, teacher, target, features)
                kd = functional.kd_loss(student, teacher, target, temperature=3.0, ce_weight=0.1)
                torch.testing.assert_close(terms.loss, kd)
                torch.testing.assert_close(terms.logged_loss, kd)
                assert terms.discount == terms.guide == 0
                gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (terms.loss, kd)]
                torch.testing.assert_close(*gradients)
                terms.loss.backward()
                assert all(parameter.grad.isfinite().all() for parameter in disk.parameters())
            assert disk.statistics().discount == 0
            dual.step()
    again = make_loss(0, **settings) if kind == "guide" else DiSKLoss(UniformGuide(discount=0), **settings).double()
    again.load_state_dict(disk.state_dict())
    assert again.terms(student, teacher, target, features).guide == 0
