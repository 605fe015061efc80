"""The equations against the oracle, by hand, at their limits, and their gradients."""

import itertools
import math
import random

import pytest
import reference
import torch
from torch.nn import functional as F  # noqa: N812

from disk_plugin import functional
from disk_plugin.functional import blocks
from disk_plugin.variants import VARIANTS

SCALARS = functional.DiSKTerms._fields
CASES = range(240)


def random_case(number, dtype):
    rng = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    n, c, spread = rng.randint(1, 6), rng.randint(2, 12), rng.choice([0.3, 1.0, 5.0, 10.0])

    def draw(*shape):
        return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    target = torch.randint(c, (n,), generator=generator)
    if rng.random() < 0.2:
        target = torch.randn(n, c, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
    elif rng.random() < 0.3:
        target[rng.randrange(n)] = -100
    weight = torch.rand(n, generator=generator, dtype=torch.float64).to(dtype) if rng.random() < 0.4 else None
    settings = {
        "variant": list(VARIANTS)[number % 3],
        "ce_weight": rng.choice([0.0, 0.1, 0.5, 1.0]),
        "distill_weight": rng.choice([0.0, 0.5, 0.9]),
        "temperature": rng.choice([1.0, 2.0, 4.0]),
        "student_temperature": rng.choice([1.0, 3.5, 4.0]),
        "top_k": rng.choice([None, 1, 2, 3, 20]),
        "multiplier": rng.choice([0.0, 0.1, 5.0, 50.0]),
        "budget": rng.choice([0.0, 0.3, 2.0]),
    }
    return (draw(n, c), draw(n, c), target, draw(n)), weight, settings


def expected_terms(inputs, weight, settings):
    lists = [tensor.double().tolist() if tensor.is_floating_point() else tensor.tolist() for tensor in inputs]
    weights = None if weight is None else weight.double().tolist()
    expected = reference.disk(*lists, sample_weight=weights, **settings)
    if VARIANTS[settings["variant"]].student_feels_budget:  # there the student minimises the budget's term too
        expected["student_loss"] += settings["multiplier"] * max(expected["violation"], 0.0)
    return expected


@pytest.mark.parametrize("number", CASES)
def test_every_term_equals_the_oracle_in_float64(number):
    inputs, weight, settings = random_case(number, torch.float64)
    terms = functional.disk_terms(*inputs, sample_weight=weight, **settings)
    expected = expected_terms(inputs, weight, settings)
    for name in SCALARS:
        assert getattr(terms, name).item() == pytest.approx(expected[name], rel=1e-10, abs=1e-13), name


@pytest.mark.parametrize("number", CASES)
def test_loss_equals_the_oracle_in_float32(number):
    inputs, weight, settings = random_case(number, torch.float32)
    loss = functional.disk_loss(*inputs, sample_weight=weight, **settings)
    scale = settings["temperature"] * settings["student_temperature"]
    assert loss.item() == pytest.approx(expected_terms(inputs, weight, settings)["loss"], rel=1e-5, abs=1e-6 * scale)


@pytest.mark.parametrize("number", CASES)
def test_single_equations_equal_the_oracle(number):
    (student, teacher, target, guide), weight, settings = random_case(number, torch.float64)
    settings |= {"variant": "paper"}
    expected = expected_terms((student, teacher, target, guide), weight, settings)
    usage = functional.usage(student, target, guide, sample_weight=weight)
    assert usage.item() == pytest.approx(expected["usage"], rel=1e-10, abs=1e-13)
    violation = functional.violation(usage, settings["budget"])
    assert violation.item() == pytest.approx(expected["violation"], rel=1e-10, abs=1e-13)
    assert functional.budget_loss(usage, settings["budget"]).item() == max(violation.item(), 0.0)
    if target.is_floating_point() or (target >= 0).all():
        scaffold = {key: settings[key] for key in ("temperature", "student_temperature", "top_k")}
        plain = expected_terms((student, teacher, target, guide), None, settings)
        kl = functional.scaffolded_kl(student, teacher, guide, **scaffold)
        assert kl.item() == pytest.approx(plain["distill"], rel=1e-10, abs=1e-12)
        discount = functional.discount(student, teacher, guide, **scaffold)
        assert discount.mean().item() == pytest.approx(plain["discount"], rel=1e-10, abs=1e-13)


def test_a_case_worked_by_hand():
    inputs, expected = reference.hand_case()
    tensors = [
        torch.tensor(inputs.pop(name), dtype=None if name == "target" else torch.float64)
        for name in ("student_logits", "teacher_logits", "target", "guide_logits")
    ]
    terms = functional.disk_terms(*tensors, **inputs)
    for name in SCALARS:
        assert getattr(terms, name).item() == pytest.approx(expected[name], rel=1e-12), name


@pytest.mark.parametrize("number", range(0, 60, 3))
def test_without_guide_it_is_plain_distillation(number):
    (student, teacher, target, _), weight, settings = random_case(number, torch.float64)
    none = torch.full(student.shape[:1], -torch.inf, dtype=torch.float64)
    kd = {key: settings[key] for key in ("ce_weight", "distill_weight", "temperature", "student_temperature")}
    loss = functional.disk_loss(student, teacher, target, none, sample_weight=weight, **settings)
    torch.testing.assert_close(loss, functional.kd_loss(student, teacher, target, sample_weight=weight, **kd))


def test_kd_equals_the_framework():
    student, teacher, target = torch.randn(8, 5).double(), torch.randn(8, 5).double(), torch.randint(5, (8,))
    loss = functional.kd_loss(student, teacher, target, ce_weight=0.3, distill_weight=0.7, temperature=3.0)
    kl = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss, 0.3 * F.cross_entropy(student, target) + 0.7 * 9 * kl)


def test_kd_equals_the_oracle():
    for number in range(0, 60, 3):
        (student, teacher, target, _), _, settings = random_case(number, torch.float64)
        kd = {key: settings[key] for key in ("ce_weight", "distill_weight", "temperature", "student_temperature")}
        expected = reference.kd(student.tolist(), teacher.tolist(), target.tolist(), **kd)
        assert functional.kd_loss(student, teacher, target, **kd).item() == pytest.approx(
            expected, rel=1e-10, abs=1e-13
        )


def test_scaffold_falls_as_the_guide_rises():
    student, teacher = torch.randn(6, 9).double(), torch.randn(6, 9).double()
    losses = [
        functional.scaffolded_kl(student, teacher, torch.full((6,), g, dtype=torch.float64), reduction="none")
        for g in (-8.0, -2.0, 0.0, 2.0, 8.0)
    ]
    for lower, higher in itertools.pairwise(losses):
        assert (higher < lower).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", [0.0, 100.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(variant, budget, reduction):
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    guide = torch.randn(4, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(4, 5).double(), torch.randint(5, (4,))
    record = VARIANTS[variant]._replace(student_feels_budget=True)  # else the value has a part without gradient

    def loss(student, guide):
        return functional.disk_terms(
            student,
            teacher,
            target,
            guide,
            variant=record,
            budget=budget,
            top_k=3,
            guide_gradient_scale=None,
            reduction=reduction,
        ).loss.sum()

    assert torch.autograd.gradcheck(loss, (student, guide))


def gradients(output, *inputs):
    return torch.autograd.grad(output, inputs, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradients_of_the_halves_are_those_of_the_loss(variant):
    student, guide = torch.randn(6, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    terms = functional.disk_terms(
        student, torch.randn(6, 5), torch.randint(5, (6,)), guide, variant=variant, budget=0.0, top_k=3
    )
    of_loss = gradients(terms.loss, student, guide)
    torch.testing.assert_close(gradients(terms.student_loss, student)[0], of_loss[0])
    torch.testing.assert_close(gradients(terms.guide_loss, guide)[0], of_loss[1])
    assert gradients(terms.student_loss + 0 * guide.sum(), guide)[0].abs().sum() == 0
    assert gradients(terms.guide_loss + 0 * student.sum(), student)[0].abs().sum() == 0


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_student_does_not_feel_the_budget_in_the_paper_variant_and_the_guide_does(scale):
    student, guide = torch.randn(6, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    inputs = (student, torch.randn(6, 5), torch.randint(5, (6,)), guide)
    found = [
        gradients(
            functional.disk_loss(*inputs, multiplier=50.0, budget=budget, guide_gradient_scale=scale), student, guide
        )
        for budget in (0.0, 100.0)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] != found[1][1]).all()


def test_the_student_feels_the_budget_in_the_imagenet_variant():
    student, guide = torch.randn(6, 5, requires_grad=True), torch.randn(6)
    inputs = (student, torch.randn(6, 5), torch.randint(5, (6,)), guide)
    found = [
        gradients(functional.disk_loss(*inputs, variant="official_imagenet", budget=budget), student)[0]
        for budget in (0.0, 100.0)
    ]
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("function", ["disk_loss", "kd_loss", "scaffolded_kl"])
def test_no_gradient_reaches_the_teacher(function):
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    guide, target = torch.randn(4, requires_grad=True), torch.randint(5, (4,))
    arguments = {"disk_loss": (target, guide), "kd_loss": (target,), "scaffolded_kl": (guide,)}[function]
    getattr(functional, function)(student, teacher, *arguments).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_the_scaled_gradient_is_the_plain_one_by_g():
    student, teacher, target = torch.randn(8, 5), torch.randn(8, 5), torch.randint(5, (8,))
    guide = torch.linspace(-6.5, 2.5, 8, dtype=torch.float64, requires_grad=True)
    plain, scaled = (
        gradients(
            functional.disk_loss(student, teacher, target, guide, multiplier=5.0, guide_gradient_scale=scale), guide
        )[0]
        for scale in (None, 0.3)
    )
    g = guide.detach().sigmoid()
    torch.testing.assert_close(scaled, plain * 0.3 / (4 * g * (1 - g)) / (16 + 5.0))


def test_a_guide_logit_out_of_reach_is_pulled_back_from_either_side():
    student, teacher, target = torch.randn(2, 5), torch.randn(2, 5), torch.randint(5, (2,))
    for multiplier in (0.0, 1000.0):
        guide = torch.tensor([-60.0, 60.0], requires_grad=True)
        loss = functional.disk_loss(student, teacher, target, guide, multiplier=multiplier, budget=0.0)
        gradient = gradients(loss, guide)[0]
        assert gradient[0] < 0 < gradient[1]


@pytest.mark.parametrize("number", range(30))
def test_fitted_student_temperature_equals_brute_force(number):
    generator = torch.Generator().manual_seed(number)
    teacher = 3 * torch.randn(20, 7, generator=generator, dtype=torch.float64)
    noise = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    mix, size = [(1.0, 0.5), (1.0, 2.0), (0.5, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, 30.0)][number % 6]
    student = size * (mix * teacher + noise)
    for temperature in (1.0, 4.0):
        expected = reference.student_temperature(student.tolist(), teacher.tolist(), temperature)
        for dtype in (torch.float64, torch.float32):
            fitted = functional.fit_student_temperature(student.to(dtype), teacher.to(dtype), temperature=temperature)
            assert fitted.item() == pytest.approx(expected, rel=1e-4)


def test_student_temperature_steps_reach_the_exact_fit():
    teacher = 3 * torch.randn(2000, 10)
    student = 0.5 * teacher + torch.randn(2000, 10)
    exact = functional.fit_student_temperature(student, teacher)
    found, moments = torch.tensor(4.0), torch.zeros(2)
    for _ in range(3):
        for index in torch.randperm(2000).split(100):
            found, moments = functional.student_temperature_step(student[index], teacher[index], moments, found)
    assert found.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_flat_student_keeps_the_teachers_temperature():
    student, teacher = torch.zeros(4, 5), torch.randn(4, 5)
    assert functional.fit_student_temperature(student, teacher, temperature=2.0) == 2.0
    found, _ = functional.student_temperature_step(student, teacher, torch.zeros(2), torch.tensor(2.0), temperature=2.0)
    assert found == 2.0


def test_nan_in_the_logits_is_not_hidden_by_the_fit():
    student = torch.randn(4, 5)
    student[0, 0] = math.nan
    assert functional.fit_student_temperature(student, torch.randn(4, 5)).isnan()


@pytest.mark.parametrize("number", range(12))
def test_optimal_guide_equals_brute_force(number):
    (student, teacher, target, _), _, settings = random_case(number, torch.float64)
    target = target.clamp(min=0) if not target.is_floating_point() else target
    chosen = {key: settings[key] for key in ("temperature", "student_temperature", "top_k")}
    for multiplier in (0.5, 5.0, 50.0):
        arguments = {"multiplier": multiplier, "distill_weight": 0.9, **chosen}
        expected = reference.optimal_guide(student.tolist(), teacher.tolist(), target.tolist(), **arguments)
        found = functional.optimal_guide(student, teacher, target, **arguments)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_optimal_multiplier_spends_the_budget():
    student, teacher, target = torch.randn(50, 10).double(), torch.randn(50, 10).double(), torch.randint(10, (50,))
    price = functional.optimal_multiplier(student, teacher, target, budget=0.4)
    g = functional.optimal_guide(student, teacher, target, multiplier=price)
    torch.testing.assert_close(functional.usage(student, target, g.logit()), torch.tensor(0.4, dtype=torch.float64))
    assert functional.optimal_multiplier(student, teacher, target, budget=1e3) == 0


def test_a_second_derivative_is_refused_not_zero():
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher, target, guide = torch.randn(4, 5), torch.arange(4), torch.zeros(4, requires_grad=True)
    loss = functional.disk_terms(student, teacher, target, guide).student_loss
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()

    def value(logits):
        return functional.disk_terms(logits, teacher, target, guide.detach()).student_loss

    first = torch.func.grad(value)
    torch.testing.assert_close(first(student.detach()), gradient.detach())
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.func.grad(lambda logits: first(logits).square().sum())(student.detach())


def test_autocast_outside_changes_no_value():
    torch.manual_seed(0)
    student, teacher, target, guide = torch.randn(8, 50), torch.randn(8, 50), torch.arange(8), torch.randn(8)
    plain = functional.disk_terms(student, teacher, target, guide, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        cast = functional.disk_terms(student, teacher, target, guide, reduction="none")
    for name in plain._fields:
        torch.testing.assert_close(getattr(cast, name), getattr(plain, name), rtol=0, atol=0)


def test_labels_alone_may_be_mapped_over():
    torch.manual_seed(0)
    student, teacher, guide = torch.randn(6, 5), torch.randn(6, 5), torch.randn(6)
    targets = torch.randint(5, (3, 6))

    def gradient(target):
        return torch.func.grad(lambda logits: functional.disk_loss(logits, teacher, target, guide))(student)

    torch.testing.assert_close(torch.vmap(gradient)(targets), torch.stack([gradient(target) for target in targets]))


def test_a_multiplier_that_is_a_number_keeps_its_digits():
    torch.manual_seed(0)
    student, teacher, target = torch.randn(6, 5).double(), torch.randn(6, 5).double(), torch.arange(6) % 5
    gradients = []
    for multiplier in (0.7, torch.tensor(0.7, dtype=torch.float64)):
        guide = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        functional.disk_loss(student, teacher, target, guide, multiplier=multiplier, budget=0.0).backward()
        gradients.append(guide.grad)
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=0)


def test_rows_in_blocks_equal_rows_at_once(monkeypatch):
    torch.manual_seed(0)
    teacher, target, guide = torch.randn(23, 7), torch.arange(23) % 7, torch.randn(23, dtype=torch.float64)
    found = []
    for size in (7 * 4, 2**20):  # blocks of four rows, the last one shorter; one block
        monkeypatch.setitem(blocks._BLOCK, "cpu", size)
        student = torch.randn(23, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logits = guide.clone().requires_grad_()
        terms = functional.disk_terms(student, teacher, target, logits, top_k=3, variant="official_cifar")
        terms.loss.backward()
        found.append((*terms, student.grad, logits.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_student_far_below_the_guide_keeps_its_relative_gradient():
    torch.manual_seed(0)
    logits, teacher = 30 * torch.randn(16, 20), torch.randn(16, 20)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        student = logits.to(dtype, copy=True).requires_grad_()
        functional.scaffolded_kl(student, teacher.to(dtype), torch.zeros(16, dtype=dtype)).backward()
        gradients.append(student.grad.double())
    size = gradients[1].norm(dim=1, keepdim=True)
    assert ((gradients[0] - gradients[1]) / size).abs().max() < 1e-3  # target - taken would be off by .06 here
