"""One g for all samples: constant, ramped, or set by the discount it takes off."""

import copy
import io
import math

import pytest
import torch
from processes import leave_group
from torch import distributed as dist
from torch import multiprocessing as mp

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.accumulation import AccumulatedBatch
from disk_plugin.distributed import attach
from disk_plugin.uniform import UniformGuide
from disk_plugin.variants import VARIANTS

N, C = 32, 6
PLAIN = {"temperature": 2.0, "ce_weight": 0.0, "distill_weight": 1.0}  # the loss's defaults, said to a function


def make_loss(*value, temperature=2.0, guide=None, **how):
    guide = UniformGuide(*value, **how) if guide is None else guide
    return DiSKLoss(guide, temperature=temperature).double()


def batch(positions=(), classes=C, n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        2 * torch.randn(n, classes, *positions, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student, teacher, torch.randint(classes, (n, *positions), generator=generator)


def g_of(disk):
    return disk.guide(torch.zeros(1, C, dtype=torch.float64)).sigmoid().item()


# ---- a number, and two ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
@pytest.mark.parametrize("value", [0.03, 0.5, 1.0])
def test_the_loss_is_that_of_the_same_g_everywhere(value, positions):
    student, teacher, target = batch(positions)
    disk = make_loss(value)
    logits = torch.full((N, *positions), value, dtype=torch.float64).logit()
    expected = functional.disk_terms(student, teacher, target, logits, multiplier=0.0, **PLAIN)
    found = disk.terms(student.requires_grad_(), teacher, target)
    for name in ("loss", "distill", "usage", "guide", "discount"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    assert torch.autograd.grad(found.loss, student)[0].isfinite().all()
    assert not list(disk.parameters())


def test_no_g_is_plain_distillation():
    student, teacher, target = batch()
    torch.testing.assert_close(
        make_loss(0)(student, teacher, target),
        functional.kd_loss(student, teacher, target, **PLAIN),
    )


def test_two_values_are_ramped_over_their_share_of_training():
    disk = make_loss((1.0, 0.0), over=0.5)
    dual = DualScheduler(disk, epochs=10)
    seen = []
    for epoch in range(11):
        seen.append(g_of(disk))
        if epoch < 10:
            dual.step()
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2] + [0.0] * 6)


# ---- the discount as a target ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [6, 1000])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("target", [0.1, 0.4, 0.7])
def test_g_finds_the_discount_asked_for(classes, temperature, target):
    student, teacher, label = batch(classes=classes)
    disk = make_loss(discount=target, temperature=temperature)
    for _ in range(60):
        terms = disk.terms(student, teacher, label)
    assert terms.discount.item() == pytest.approx(target, abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("positions", [(), (3, 2)], ids=["pooled", "dense"])
def test_the_step_is_newtons_by_the_slope_of_the_discount(variant, positions):
    student, teacher, label = batch(positions, n=8)
    label[1] = -100
    student[1] = math.nan
    guide = UniformGuide(discount=0.5)
    disk = DiSKLoss(guide, temperature=2.0, top_k=3, variant=variant).double()
    guide.log_guide.fill_(-2.5)

    def discount(log_g):
        logits = torch.full((8, *positions), math.exp(log_g), dtype=torch.float64).logit()
        inputs = student, teacher, label, logits
        return functional.disk_terms(*inputs, temperature=2.0, top_k=3, variant=variant).discount.item()

    slope = (discount(-2.5 + 1e-5) - discount(-2.5 - 1e-5)) / 2e-5
    reach = 1.0  # the pull on the three classes, to which the target relates
    if VARIANTS[variant].teacher_target == "all":
        reached = ((teacher / 2).softmax(1) * functional.scaffold_mask(teacher, 3)).sum(1)
        reach = reached[label != -100].mean().item()
    guide.discount = (discount(-2.5) + 0.03) / reach  # near enough for an unbounded step
    disk(student, teacher, label)
    assert guide.log_guide.item() == pytest.approx(-2.5 + 0.03 / slope, rel=1e-6)


def test_steps_are_bounded_and_g_stays_in_its_range():
    disk = make_loss(discount=0.99)
    before = disk.guide.log_guide.item()
    disk(*batch())
    assert disk.guide.log_guide.item() == pytest.approx(before + 0.5)
    for _ in range(40):
        disk(*batch())
    assert disk.guide.log_guide.item() == 0.0
    assert g_of(disk) == 1.0
    disk.guide.discount = 0.0
    for _ in range(80):
        loss = disk(*batch())
    assert disk.guide.log_guide.item() == -16.0
    torch.testing.assert_close(loss, functional.kd_loss(*batch(), **PLAIN), rtol=1e-4, atol=1e-4)


def test_the_automatic_target_is_what_the_student_fails_to_follow_ramped_in():
    student, teacher, label = batch()
    agreement = (student.argmax(1) == teacher.argmax(1)).double().mean().item()
    disk = make_loss(discount="auto", share=0.6, over=0.5)
    dual = DualScheduler(disk, epochs=8)
    ends = []
    for _ in range(6):
        for _ in range(40):
            terms = disk.terms(student, teacher, label)
        ends.append(terms.discount.item())
        dual.step()
    wanted = min(0.6 * (1 - agreement), 0.5)
    assert wanted > 0.2
    assert ends == pytest.approx([0, wanted / 4, wanted / 2, 3 * wanted / 4, wanted, wanted], abs=1e-4)


def test_the_agreement_is_a_running_mean_that_starts_with_the_first_batch():
    disk = make_loss(discount="auto")
    seen = []
    for seed in range(3):
        student, teacher, label = batch(seed=seed)
        disk(student, teacher, label)
        seen.append((student.argmax(1) == teacher.argmax(1)).double().mean().item())
    expected = 0.7 * (0.7 * seen[0] + 0.3 * seen[1]) + 0.3 * seen[2]
    assert disk.guide.agreement.item() == pytest.approx(expected)


@pytest.mark.parametrize("size", [0, N])
def test_a_batch_without_a_counted_position_moves_nothing(size):
    disk = make_loss(discount="auto")
    disk(*batch())
    before = copy.deepcopy(disk.guide.state_dict())
    student, teacher, label = (value[:size] for value in batch())
    disk(student, teacher, torch.full_like(label, -100))
    torch.testing.assert_close(disk.guide.state_dict(), before, rtol=0, atol=0)


def test_in_large_maps_it_settles_whichever_samples_are_ignored():
    student, teacher, label = batch((20, 20), n=4)
    disk = make_loss(discount=0.4)
    for ignored in (slice(0), slice(1), slice(3)):
        label[ignored] = -100
        for _ in range(30):
            terms = disk.terms(student, teacher, label)
        assert terms.discount.item() == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_moves_nothing(value):
    disk = make_loss(discount="auto")
    disk(*batch())
    before = copy.deepcopy(disk.guide.state_dict())
    student, teacher, label = batch()
    teacher[0, 0] = value
    disk(student, teacher, label)
    torch.testing.assert_close(disk.guide.state_dict(), before, rtol=0, atol=0)


def test_evaluation_moves_nothing():
    disk = make_loss(discount=0.4).eval()
    before = copy.deepcopy(disk.guide.state_dict())
    disk(*batch())
    torch.testing.assert_close(disk.guide.state_dict(), before, rtol=0, atol=0)


# ---- state, parts, processes ----------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_bit_for_bit():
    def run(disk, dual, epochs):
        for epoch in epochs:
            for step in range(3):
                disk(*batch(seed=10 * epoch + step))
            dual.step()

    def fresh():
        disk = make_loss(discount="auto")
        return disk, DualScheduler(disk, epochs=8)

    whole, half, resumed = fresh(), fresh(), fresh()
    run(*whole, range(8))
    run(*half, range(4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in half], file)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*resumed, range(4, 8))
    torch.testing.assert_close(resumed[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)
    assert whole[0].guide.log_guide != half[0].guide.log_guide


def test_micro_batches_move_it_once_by_the_whole_batch():
    student, teacher, label = batch()
    disk, twin = make_loss(discount=0.4), make_loss(discount=0.4)
    twin(student, teacher, label)
    whole = AccumulatedBatch(disk)
    student.requires_grad_()
    for part in (slice(10), slice(10, N)):
        whole.add(student[part], teacher[part], label[part]).backward()
    assert disk.guide.log_guide.item() == pytest.approx(math.log(0.01))
    whole.terms().guide_loss.backward()  # as the loop is written, though there is nothing to train
    torch.testing.assert_close(disk.guide.state_dict(), twin.guide.state_dict())


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    disk = make_loss(discount="auto", guide=None)
    disk.guide.set_progress(0.5)
    attach(disk)
    for seed in range(4):
        disk(*(value[rank::2] for value in batch(seed=seed)))
    torch.save(disk.guide.state_dict(), f"{folder}/{rank}")
    leave_group()


def test_two_processes_have_one_g_that_of_the_whole_batch(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
    single = make_loss(discount="auto")
    single.guide.set_progress(0.5)
    for seed in range(4):
        single(*batch(seed=seed))
    torch.testing.assert_close(both[0], single.guide.state_dict())


def test_it_compiles_without_graph_breaks():
    torch.compiler.reset()
    disk = make_loss(discount=0.4)
    twin = copy.deepcopy(disk)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        torch.testing.assert_close(compiled(*batch(seed=seed)), disk(*batch(seed=seed)))
    torch.testing.assert_close(twin.guide.state_dict(), disk.guide.state_dict())


def test_it_keeps_its_digits_through_a_cast_and_starts_anew_off_the_meta_device():
    guide = UniformGuide(discount=0.4).to(torch.bfloat16)
    assert guide.log_guide.item() == math.log(0.01)
    with torch.device("meta"):
        disk = DiSKLoss(UniformGuide(discount=0.4))
    disk.to_empty(device="cpu")
    torch.testing.assert_close(disk.guide.state_dict(), UniformGuide(discount=0.4).state_dict(), rtol=0, atol=0)


def test_under_torch_func_it_is_refused_in_training_mode_with_the_cure():
    student, teacher, label = batch()
    disk = make_loss(discount=0.4)
    with pytest.raises(RuntimeError, match=r"updates a buffer in training mode.*call disk.eval\(\)"):
        torch.func.grad(lambda student: disk(student, teacher, label))(student)
    disk.eval()
    torch.func.grad(lambda student: disk(student, teacher, label))(student)
    fixed = make_loss(0.4)
    torch.func.grad(lambda student: fixed(student, teacher, label))(student)


def test_a_guide_without_parameters_is_never_called_dead():
    disk = make_loss(1.0)
    dual = DualScheduler(disk, epochs=8)
    disk(*batch())
    dual.step()


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({}, ValueError, "needs either value or discount, got value=None, discount=None"),
        ({"value": 0.1, "discount": 0.4}, ValueError, "needs either value or discount"),
        ({"value": 1.5}, ValueError, "value must be <= 1, got 1.5"),
        ({"value": -0.1}, ValueError, "value must be >= 0"),
        ({"value": (0.1, 0.2, 0.3)}, ValueError, r"value must be a number or \(first, last\)"),
        ({"value": "high"}, TypeError, "value must be a number, got str"),
        ({"discount": 1.0}, ValueError, "discount must be <= 0.99"),
        ({"discount": "much"}, ValueError, r"discount must be one of \['auto'\]"),
        ({"discount": True}, TypeError, "discount must be a number, got bool"),
        ({"discount": "auto", "share": 0}, ValueError, "share must be > 0"),
        ({"discount": "auto", "over": 2}, ValueError, "over must be <= 1"),
    ],
)
def test_bad_settings_are_refused(how, error, message):
    with pytest.raises(error, match=message):
        UniformGuide(**how)


@pytest.mark.parametrize(("name", "value"), [("budget", 0.1), ("budget", 0.0), ("multiplier", 50)])
@pytest.mark.parametrize("guide", [{"value": 0.3}, {"discount": "auto"}])
def test_a_budget_that_could_bound_nothing_is_refused(guide, name, value):
    with pytest.raises(ValueError, match=f"{name} must be left out beside a UniformGuide, which sets g; got {value:g}"):
        DiSKLoss(UniformGuide(**guide), **{name: value})
    assert DiSKLoss(UniformGuide(**guide), multiplier=0).multiplier == 0
    felt = DiSKLoss(UniformGuide(**guide), variant="official_imagenet", **{name: value})  # its hinge trains the student
    assert getattr(felt, name) == value


@pytest.mark.parametrize("asked", [{"multiplier": (1, 50)}, {"budget": 0.1, "period": 2}, {"rule": "adaptive"}])
def test_a_schedule_that_could_bound_nothing_is_refused(asked):
    with pytest.raises(ValueError, match=f"{list(asked)[-1]}.* must be left out beside a UniformGuide.* by its value"):
        DualScheduler(DiSKLoss(UniformGuide((1.0, 0.0))), epochs=3, **asked)
    with pytest.raises(ValueError, match="by its discount"):
        DualScheduler(DiSKLoss(UniformGuide(discount="auto")), epochs=3, **asked)
    DualScheduler(DiSKLoss(UniformGuide(0.3), variant="official_imagenet"), epochs=3, **asked)


def test_progress_outside_training_is_refused_or_ends_it():
    guide = UniformGuide((1.0, 0.0))
    with pytest.raises(ValueError, match="progress must be >= 0"):
        guide.set_progress(-0.1)
    guide.set_progress(1.5)
    assert guide.progress.item() == 1.0


# ---- where a trained guide starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [0.05, 0.5, 0.95])
def test_a_guide_starts_about_where_it_is_told(initial):
    guide = GuideHead(C, 3, initial=initial)
    g = guide(torch.randn(200, C), torch.randn(200, 3)).sigmoid()
    assert g.mean().item() == pytest.approx(initial, abs=0.12)
    assert guide.mlp[-1].bias.item() == pytest.approx(math.log(initial / (1 - initial)))


def test_without_it_the_start_is_torchs_own():
    torch.manual_seed(0)
    plain = GuideHead(C)
    torch.manual_seed(0)
    torch.testing.assert_close(
        GuideHead(C, initial=0.9).mlp[:-1].state_dict(), plain.mlp[:-1].state_dict(), rtol=0, atol=0
    )
    assert abs(plain.mlp[-1].bias.item()) < 0.1


@pytest.mark.parametrize("initial", [0.0, 1.0, -0.5])
def test_an_initial_g_at_or_beyond_the_ends_is_refused(initial):
    with pytest.raises(ValueError, match="initial must be"):
        GuideHead(C, initial=initial)


def test_repr_shows_what_sets_g_and_no_budget():
    shown = repr(DiSKLoss(UniformGuide(discount=0.25)))
    assert "discount=0.25" in shown
    assert ", budget=" not in shown
    assert ", multiplier=" not in shown
