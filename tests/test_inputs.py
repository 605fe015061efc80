"""Inputs people really have: dense, ignored, soft, weighted, half, huge, broken, empty, in parts."""

import copy
import itertools
import math

import pytest
import reference
import torch
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, GuideHead, functional
from disk_plugin.variants import VARIANTS

FIELDS = tuple(name for name in functional.DiSKTerms._fields if name != "counted")  # what is a mean
HALVES = ("loss", "student_loss", "guide_loss")
SETTINGS = {
    "ce_weight": 0.3,
    "distill_weight": 0.6,
    "temperature": 2.0,
    "student_temperature": 3.0,
    "top_k": 2,
    "multiplier": 5.0,
    "budget": 0.1,
}
SLACK = SETTINGS | {"budget": 100.0}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
N, C, D = 8, 5, 3

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_position = pytest.mark.parametrize("positions", [(), (3,), (3, 2)], ids=["pooled", "1d", "2d"])


# ---- helpers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small gain nothing from a second thread, which on a busy machine costs eight times the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(positions=(), *, n=N, dtype=torch.float64):
    """Student logits, teacher logits, class indices, guide logits; leaves where a player takes a gradient."""
    student = (2 * torch.randn(n, C, *positions)).to(dtype).requires_grad_()
    guide = torch.randn(n, *positions).to(dtype).requires_grad_()
    return student, (2 * torch.randn(n, C, *positions)).to(dtype), torch.randint(C, (n, *positions)), guide


def changed(tensor, where, value):
    """Return a leaf with another value at some places."""
    return tensor.detach().clone().index_put(where, torch.as_tensor(value, dtype=tensor.dtype)).requires_grad_()


def rows(tensor):
    """Flatten (N, C, d1, ...) to a list of rows of C."""
    return tensor.detach().movedim(1, -1).flatten(0, -2).tolist()


def oracle(student, teacher, target, guide, *, sample_weight=None, **settings):
    """Evaluate the reference on the flattened positions."""
    if sample_weight is not None:
        trailing = [1] * (guide.ndim - sample_weight.ndim)
        sample_weight = sample_weight.reshape(*sample_weight.shape, *trailing).expand_as(guide).flatten().tolist()
    labels = rows(target) if target.is_floating_point() else target.flatten().tolist()
    expected = reference.disk(
        rows(student), rows(teacher), labels, guide.detach().flatten().tolist(), sample_weight=sample_weight, **settings
    )
    if VARIANTS[settings.get("variant", "paper")].student_feels_budget:
        expected["student_loss"] += settings["multiplier"] * max(expected["violation"], 0.0)
    return expected


def assert_equal_to_oracle(terms, expected):
    for name in FIELDS:
        assert getattr(terms, name).item() == pytest.approx(expected[name], rel=1e-10, abs=1e-12), name


def assert_same_terms(found, expected, **tolerance):
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name, **tolerance)


def gradients(output, *inputs):
    return torch.autograd.grad(output, inputs, retain_graph=True)


def players(disk, student):
    return (student, *disk.guide.parameters())


def assert_finite(tensors):
    for tensor in tensors:
        assert tensor.isfinite().all()


def make_loss(feature_dim=0, **settings):
    return DiSKLoss(GuideHead(C, feature_dim), **settings).double()


# ---- dense predictions -----------------------------------------------------------------------------------------------


@every_variant
@every_position
@pytest.mark.parametrize("settings", [SETTINGS, SLACK, SETTINGS | {"top_k": None}], ids=["violated", "slack", "all"])
def test_dense_terms_equal_the_oracle_on_flattened_positions(variant, positions, settings):
    inputs = batch(positions)
    terms = functional.disk_terms(*inputs, variant=variant, **settings)
    assert_equal_to_oracle(terms, oracle(*inputs, variant=variant, **settings))


@every_variant
@every_position
def test_every_position_of_a_dense_batch_equals_the_oracle(variant, positions):
    inputs = batch(positions)
    terms = functional.disk_terms(*inputs, variant=variant, reduction="none", **SETTINGS)
    expected = oracle(*inputs, variant=variant, **SETTINGS)["per_sample"]
    if variant != "paper":
        expected.pop("usage")  # there the oracle's is not yet scaled by positions / errors
    for name, values in expected.items():
        values = torch.tensor(values, dtype=torch.float64).reshape(inputs[3].shape)
        torch.testing.assert_close(getattr(terms, name), values, msg=name, **EXACT)


@every_variant
@every_position
@pytest.mark.parametrize("dense_features", [False, True], ids=["pooled features", "dense features"])
def test_module_with_features_equals_the_oracle_on_flattened_positions(variant, positions, dense_features):
    student, teacher, target, _ = batch(positions)
    features = torch.randn(N, D, *(positions if dense_features else ()), dtype=torch.float64)
    disk = make_loss(D, variant=variant, **SETTINGS)
    terms = disk.terms(student, teacher, target, features)
    trailing = [1] * (teacher.ndim - features.ndim)
    spread = features.reshape(*features.shape, *trailing).expand(N, D, *positions)
    one_by_one = disk.guide(*(torch.tensor(rows(tensor), dtype=torch.float64) for tensor in (teacher, spread)))
    assert_equal_to_oracle(terms, oracle(student, teacher, target, one_by_one, variant=variant, **SETTINGS))
    assert terms.loss.item() == disk(student, teacher, target, features).item()


# ---- ignored positions -----------------------------------------------------------------------------------------------


@every_variant
@every_position
@pytest.mark.parametrize("ignore_index", [-100, 255, -1, 1])
@pytest.mark.parametrize("settings", [SETTINGS, SLACK], ids=["violated", "slack"])
def test_ignored_positions_are_out_of_sums_and_denominators(variant, positions, ignore_index, settings):
    student, teacher, target, guide = batch(positions)
    target[1::3] = ignore_index
    weight = torch.rand(N, dtype=torch.float64)
    settings = settings | {"variant": variant, "ignore_index": ignore_index, "sample_weight": weight}
    terms = functional.disk_terms(student, teacher, target, guide, **settings)
    assert_equal_to_oracle(terms, oracle(student, teacher, target, guide, **settings))


@every_variant
@every_position
@pytest.mark.parametrize("budget", [0.1, 100.0])
def test_what_stands_at_ignored_positions_changes_nothing(variant, positions, budget):
    student, teacher, target, guide = batch(positions)
    target[2] = target[5] = -100
    settings = SETTINGS | {"variant": variant, "budget": budget}
    where = (torch.tensor([2, 5]),)
    others = changed(student, where, 9 * torch.randn(2, C, *positions)), changed(guide, where, 77.0)
    other_teacher = changed(teacher, where, 9 * torch.randn(2, C, *positions)).detach()
    first = functional.disk_terms(student, teacher, target, guide, **settings)
    second = functional.disk_terms(others[0], other_teacher, target, others[1], **settings)
    assert_same_terms(second, first, rtol=0, atol=0)
    for ours, theirs in zip(gradients(first.loss, student, guide), gradients(second.loss, *others), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours[where].any()


@every_position
@pytest.mark.parametrize("student_temperature", [None, "fit"])
def test_what_stands_at_ignored_positions_changes_no_gradient_statistic_or_temperature(positions, student_temperature):
    student, teacher, target, _ = batch(positions)
    target[2] = target[5] = -100
    where = (torch.tensor([2, 5]),)
    other_student = changed(student, where, 9 * torch.randn(2, C, *positions))
    other_teacher = changed(teacher, where, 9 * torch.randn(2, C, *positions)).detach()
    first = make_loss(student_temperature=student_temperature, budget=0.1)
    second = copy.deepcopy(first)
    for _ in range(3):
        expected, found = first(student, teacher, target), second(other_student, other_teacher, target)
        torch.testing.assert_close(found, expected, **EXACT)
    ours, theirs = gradients(expected, *players(first, student)), gradients(found, *players(second, other_student))
    torch.testing.assert_close(theirs, ours, **EXACT)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), **EXACT)
    assert first.statistics().positions == 3 * (target != -100).sum().item()


def test_ignored_positions_are_out_of_the_smallest_and_largest_guide():
    student, teacher, target, _ = batch()
    disk = make_loss(discount=None)
    g = disk.guide(teacher).sigmoid()
    for index in (g.argmin(), g.argmax()):
        target[index] = -100
    disk(student, teacher, target)
    rest = g[target != -100]
    seen = disk.statistics()
    assert (seen.guide_min, seen.guide_max) == (rest.min().item(), rest.max().item())
    assert seen.positions == N - 2


@every_variant
@every_position
@pytest.mark.parametrize("budget", [0.0, 0.1])
def test_all_ignored_gives_zero_loss_and_zero_gradients(variant, positions, budget):
    student, teacher, target, _ = batch(positions)
    disk = make_loss(variant=variant, **SETTINGS | {"budget": budget})
    terms = disk.terms(student, teacher, torch.full_like(target, -100))
    for name in FIELDS:
        assert getattr(terms, name).item() == 0, name
    for gradient in gradients(terms.loss, *players(disk, student)):
        assert not gradient.any()
    assert disk.statistics().positions == 0


@every_variant
@every_position
def test_per_position_terms_are_zero_where_ignored(variant, positions):
    student, teacher, target, guide = batch(positions)
    target[1::2] = 255
    terms = functional.disk_terms(
        student, teacher, target, guide, variant=variant, ignore_index=255, reduction="none", **SETTINGS
    )
    for name in FIELDS:
        assert not getattr(terms, name)[1::2].any(), name
        assert getattr(terms, name)[::2].any() or name in ("correct", "agreement"), name


@every_position
def test_other_functions_leave_ignored_positions_out(positions):
    student, teacher, target, guide = batch(positions)
    target[1::2] = 255
    kept = student[::2], teacher[::2], target[::2], guide[::2]
    torch.testing.assert_close(
        functional.kd_loss(student, teacher, target, ignore_index=255), functional.kd_loss(*kept[:3]), **EXACT
    )
    torch.testing.assert_close(
        functional.usage(student, target, guide, ignore_index=255), functional.usage(kept[0], *kept[2:]), **EXACT
    )
    assert not functional.kd_loss(student, teacher, target, ignore_index=255, reduction="none")[1::2].any()
    assert not functional.usage(student, target, guide, ignore_index=255, reduction="none")[1::2].any()


# ---- probability targets ---------------------------------------------------------------------------------------------


def one_hot(target):
    return F.one_hot(target, C).movedim(-1, 1).double()


def mixup(target):
    return 0.7 * one_hot(target) + 0.3 * one_hot(target.flip(0))


def smoothed(target):
    return 0.9 * one_hot(target) + 0.1 / C


@every_variant
@every_position
def test_one_hot_targets_equal_class_indices(variant, positions):
    student, teacher, target, guide = batch(positions)
    hard = functional.disk_terms(student, teacher, target, guide, variant=variant, **SETTINGS)
    soft = functional.disk_terms(student, teacher, one_hot(target), guide, variant=variant, **SETTINGS)
    assert_same_terms(soft, hard, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(soft.loss, student, guide), gradients(hard.loss, student, guide), rtol=1e-12, atol=1e-15
    )


@every_variant
@every_position
@pytest.mark.parametrize("soften", [mixup, smoothed])
def test_soft_targets_equal_the_oracle(variant, positions, soften):
    student, teacher, target, guide = batch(positions)
    soft = soften(target)
    terms = functional.disk_terms(student, teacher, soft, guide, variant=variant, **SETTINGS)
    assert_equal_to_oracle(terms, oracle(student, teacher, soft, guide, variant=variant, **SETTINGS))
    torch.testing.assert_close(terms.ce, F.cross_entropy(student, soft, reduction="none").mean().detach(), **EXACT)


@every_variant
@pytest.mark.parametrize("soften", [mixup, smoothed])
def test_of_a_soft_target_only_the_cross_entropy_is_soft(variant, soften):
    student, teacher, target, guide = batch()
    soft = functional.disk_terms(student, teacher, soften(target), guide, variant=variant, **SETTINGS)
    hard = functional.disk_terms(student, teacher, target, guide, variant=variant, **SETTINGS)
    for name in set(FIELDS) - {"ce", "loss", "student_loss", "logged_loss"}:
        assert torch.equal(getattr(soft, name), getattr(hard, name)), name
    assert soft.ce.item() != hard.ce.item()
    assert torch.equal(functional.usage(student, soften(target), guide), functional.usage(student, target, guide))


def test_soft_targets_of_another_dtype_are_taken_and_counted():
    student, teacher, target, _ = batch(dtype=torch.float32)
    disk = DiSKLoss(GuideHead(C), discount=None)
    found = disk(student, teacher, mixup(target).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, disk(student, teacher, mixup(target).bfloat16().float()))
    assert disk.statistics().positions == 2 * N


# ---- sample weights --------------------------------------------------------------------------------------------------


@every_variant
@every_position
@pytest.mark.parametrize("full", [False, True], ids=["per sample", "per position"])
def test_weighted_terms_equal_the_oracle(variant, positions, full):
    inputs = batch(positions)
    weight = 3 * torch.rand(N, *(positions if full else ()), dtype=torch.float64)
    terms = functional.disk_terms(*inputs, variant=variant, sample_weight=weight, **SETTINGS)
    assert_equal_to_oracle(terms, oracle(*inputs, variant=variant, sample_weight=weight, **SETTINGS))


def test_a_weight_per_sample_is_never_taken_for_one_per_column():
    inputs = batch((N,))
    weight = torch.rand(N, dtype=torch.float64)
    terms = functional.disk_terms(*inputs, sample_weight=weight, **SETTINGS)
    full = functional.disk_terms(*inputs, sample_weight=weight[:, None].expand(N, N), **SETTINGS)
    assert_same_terms(terms, full)
    assert_equal_to_oracle(terms, oracle(*inputs, sample_weight=weight, **SETTINGS))


@every_variant
@every_position
def test_weights_of_one_equal_none(variant, positions):
    inputs = batch(positions)
    plain = functional.disk_terms(*inputs, variant=variant, **SETTINGS)
    ones = functional.disk_terms(*inputs, variant=variant, sample_weight=torch.ones(N), **SETTINGS)
    assert_same_terms(ones, plain, rtol=0, atol=0)
    both = (gradients(terms.loss, inputs[0], inputs[3]) for terms in (ones, plain))
    assert all(itertools.starmap(torch.equal, zip(*both, strict=True)))


@every_variant
def test_weights_of_zero_give_zero_loss_and_gradients(variant):
    student, teacher, target, _ = batch()
    disk = make_loss(variant=variant, **SETTINGS)
    terms = disk.terms(student, teacher, target, sample_weight=torch.zeros(N))
    for name in (*HALVES, "ce", "distill", "usage"):
        assert getattr(terms, name).item() == 0, name
    for gradient in gradients(terms.loss, *players(disk, student)):
        assert not gradient.any()


@every_variant
def test_denominators_are_counts_whatever_the_weights(variant):
    inputs = batch()
    weight = torch.rand(N, dtype=torch.float64)
    once = functional.disk_terms(*inputs, variant=variant, sample_weight=weight, **SETTINGS)
    twice = functional.disk_terms(*inputs, variant=variant, sample_weight=2 * weight, **SETTINGS)
    for name in ("ce", "distill", "usage"):
        assert getattr(twice, name).item() == 2 * getattr(once, name).item(), name
    for name in ("guide", "discount", "correct", "agreement"):
        assert torch.equal(getattr(twice, name), getattr(once, name)), name


def test_no_gradient_reaches_the_weights():
    weight = torch.rand(N, requires_grad=True)
    functional.disk_loss(*batch(), sample_weight=weight).backward()
    assert weight.grad is None


# ---- sizes and strides -----------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("top_k", [C, C + 1, 1000])
def test_top_k_of_all_classes_equals_none(variant, top_k):
    inputs = batch((2,))
    found = functional.disk_terms(*inputs, variant=variant, **SETTINGS | {"top_k": top_k})
    expected = functional.disk_terms(*inputs, variant=variant, **SETTINGS | {"top_k": None})
    assert_same_terms(found, expected, rtol=0, atol=0)


@every_variant
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("top_k", [1, 2, None])
def test_two_classes_equal_the_oracle(variant, n, top_k):
    student, teacher, guide = torch.randn(n, 2).double(), torch.randn(n, 2).double(), torch.randn(n).double()
    inputs, settings = (student, teacher, torch.randint(2, (n,)), guide), SETTINGS | {"top_k": top_k}
    terms = functional.disk_terms(*inputs, variant=variant, **settings)
    assert_equal_to_oracle(terms, oracle(*inputs, variant=variant, **settings))


@every_variant
@every_position
def test_a_batch_of_one_equals_the_oracle_and_gives_finite_gradients(variant, positions):
    student, teacher, target, _ = batch(positions, n=1)
    disk = make_loss(variant=variant, **SETTINGS)
    terms = disk.terms(student, teacher, target)
    guide = disk.guide(teacher)
    assert_equal_to_oracle(terms, oracle(student, teacher, target, guide, variant=variant, **SETTINGS))
    assert_finite(gradients(terms.loss, *players(disk, student)))


@every_variant
@pytest.mark.parametrize("right", [True, False], ids=["all correct", "all wrong"])
@pytest.mark.parametrize("settings", [SETTINGS, SLACK], ids=["violated", "slack"])
def test_a_batch_without_errors_or_hits_equals_the_oracle_and_gives_finite_gradients(variant, right, settings):
    student, teacher, _, _ = batch()
    target = student.argmax(1) if right else (student.argmax(1) + 1) % C
    disk = make_loss(variant=variant, **settings)
    terms = disk.terms(student, teacher, target)
    assert terms.correct.item() == float(right)
    assert_equal_to_oracle(terms, oracle(student, teacher, target, disk.guide(teacher), variant=variant, **settings))
    assert_finite(gradients(terms.loss, *players(disk, student)))


@every_variant
@every_position
@pytest.mark.parametrize("student_temperature", [None, "fit"])
def test_an_empty_batch_gives_zero_loss_zero_gradients_and_leaves_the_state(variant, positions, student_temperature):
    disk = make_loss(variant=variant, student_temperature=student_temperature)
    disk(*batch(positions)[:3])
    before = copy.deepcopy(disk.state_dict())
    student, teacher, target, guide = batch(positions, n=0)
    terms = disk.terms(student, teacher, target)
    assert [getattr(terms, name).item() for name in FIELDS] == [0.0] * len(FIELDS)
    for gradient in gradients(terms.loss, *players(disk, student)):
        assert not gradient.any()
    torch.testing.assert_close(disk.state_dict(), before, rtol=0, atol=0)
    assert functional.scaffolded_kl(student, teacher, guide).item() == 0
    assert functional.kd_loss(student, teacher, target).item() == 0
    assert functional.usage(student, target, guide).item() == 0
    assert disk.terms(student, teacher, target, reduction="none").loss.shape == (0, *positions)


def strided(tensor):
    return tensor.repeat_interleave(2, 0)[::2]


def transposed(tensor):
    return tensor.movedim(1, 0).contiguous().movedim(0, 1) if tensor.ndim > 1 else strided(tensor)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


@every_variant
@pytest.mark.parametrize(
    ("layout", "positions"),
    [(strided, ()), (strided, (3, 2)), (transposed, ()), (transposed, (3, 2)), (channels_last, (3, 2))],
)
def test_non_contiguous_tensors_equal_contiguous_ones(variant, layout, positions):
    student, teacher, target, _ = batch(positions)
    features, weight = torch.randn(N, D, *positions).double(), torch.rand(N, *positions).double()
    disk = make_loss(D, variant=variant, **SETTINGS)
    plain = student, teacher, target, features
    odd = [layout(tensor) for tensor in plain]
    assert not odd[1].is_contiguous()
    expected = disk.terms(*plain, sample_weight=weight)
    found = disk.terms(*odd, sample_weight=layout(weight))
    assert_same_terms(found, expected, **EXACT)
    torch.testing.assert_close(
        gradients(found.loss, *players(disk, student)), gradients(expected.loss, *players(disk, student)), **EXACT
    )


# ---- ties in the top-K -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 4, 9])
def test_ties_mark_exactly_k_classes_the_lowest_index_first(dtype, top_k):
    teacher = torch.randint(3, (200, 10)).to(dtype)
    mask = functional.scaffold_mask(teacher, top_k)
    assert (mask.sum(1) == top_k).all()
    for row, marked in zip(teacher.tolist(), mask, strict=True):
        assert set(marked.nonzero().flatten().tolist()) == reference.top_classes(row, top_k)


def test_ties_are_broken_alike_in_any_order_of_the_batch_and_at_every_position():
    teacher = torch.randint(2, (50, 12)).double()
    mask, order = functional.scaffold_mask(teacher, 5), torch.randperm(50)
    assert torch.equal(functional.scaffold_mask(teacher[order], 5), mask[order])
    dense = teacher.reshape(5, 10, 12).movedim(-1, 1)
    assert torch.equal(functional.scaffold_mask(dense, 5), mask.reshape(5, 10, 12).movedim(-1, 1))


@every_variant
def test_ties_equal_the_oracle(variant):
    student, _, target, guide = batch()
    teacher = torch.randint(2, (N, C)).double()
    terms = functional.disk_terms(student, teacher, target, guide, variant=variant, **SETTINGS)
    assert_equal_to_oracle(terms, oracle(student, teacher, target, guide, variant=variant, **SETTINGS))


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_results_are_float32_or_wider(variant, reduction, dtype, expected):
    student, teacher, target, _ = batch(dtype=dtype)
    disk = DiSKLoss(GuideHead(C), variant=variant)
    terms = disk.terms(student, teacher, target, reduction=reduction)
    assert {getattr(terms, name).dtype for name in FIELDS} == {expected}
    terms.loss.sum().backward()
    assert student.grad.dtype == dtype
    assert {parameter.grad.dtype for parameter in disk.guide.parameters()} == {torch.float32}
    assert functional.kd_loss(student, teacher, target).dtype == expected
    assert functional.scaffolded_kl(student, teacher, student[:, 0]).dtype == expected
    assert functional.usage(student, target, student[:, 0]).dtype == expected


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_give_the_result_of_the_same_values_in_float32(variant, dtype):
    student, teacher, target, _ = batch(dtype=dtype)
    disk = make_loss(variant=variant, **SETTINGS).float()
    wide = student.detach().float().requires_grad_()
    found, expected = disk.terms(student, teacher, target), disk.terms(wide, teacher.float(), target)
    assert_same_terms(found, expected)
    ours, theirs = gradients(found.loss, *players(disk, student)), gradients(expected.loss, *players(disk, wide))
    torch.testing.assert_close(ours[0], theirs[0].to(dtype))
    torch.testing.assert_close(ours[1:], theirs[1:])


@every_variant
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)],
)
def test_mixed_dtypes_give_the_result_of_the_same_values_in_float32(variant, student_dtype, teacher_dtype):
    student, teacher, target, _ = batch(dtype=torch.float32)
    student, teacher = student.detach().to(student_dtype).requires_grad_(), teacher.to(teacher_dtype)
    disk = make_loss(variant=variant, **SETTINGS).float()
    terms = disk.terms(student, teacher, target)
    assert_same_terms(terms, disk.terms(student.float(), teacher.float(), target))
    assert_finite(gradients(terms.loss, *players(disk, student)))


@every_variant
def test_under_autocast_the_result_is_the_one_outside(variant):
    layer = torch.nn.Linear(7, C)
    x, teacher, target, features = torch.randn(N, 7), torch.randn(N, C), torch.randint(C, (N,)), torch.randn(N, D)
    disk = make_loss(D, variant=variant, **SETTINGS).float()
    twin = copy.deepcopy(disk)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = layer(x)
        assert student.dtype == torch.bfloat16
        found = disk.terms(student, teacher.bfloat16(), target, features.bfloat16())
    found.loss.backward()
    outside = student.detach().requires_grad_()
    expected = twin.terms(outside, teacher.bfloat16(), target, features.bfloat16())
    expected.loss.backward()
    assert found.loss.dtype == torch.float32
    assert_same_terms(found, expected, rtol=0, atol=0)
    for ours, theirs in zip(disk.guide.parameters(), twin.guide.parameters(), strict=True):
        assert ours.grad.isfinite().all()
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert_finite([layer.weight.grad])
    torch.testing.assert_close(disk.state_dict(), twin.state_dict())


# ---- extremes --------------------------------------------------------------------------------------------------------


def huge(*shape, dtype):
    return (1e4 * (2 * torch.randint(2, shape) - 1)).to(dtype)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [1, 2, None])
@pytest.mark.parametrize("budget", [0.1, 1e6])
@pytest.mark.parametrize("student_temperature", [3.0, "fit"])
def test_huge_logits_give_finite_loss_and_gradients(variant, dtype, top_k, budget, student_temperature):
    disk = DiSKLoss(
        GuideHead(C), variant=variant, top_k=top_k, budget=budget, student_temperature=student_temperature
    ).to(dtype)
    for student, teacher in itertools.product((huge(N, C, dtype=dtype), torch.randn(N, C, dtype=dtype)), repeat=2):
        student = student.clone().requires_grad_()
        terms = disk.terms(student, teacher, torch.arange(N) % C)
        assert_finite(getattr(terms, name) for name in FIELDS)
        assert_finite(gradients(terms.loss, *players(disk, student)))
    assert_finite(disk.state_dict().values())


@every_variant
def test_huge_logits_equal_the_oracle(variant):
    student, teacher, target = huge(N, C, dtype=torch.float64), huge(N, C, dtype=torch.float64), torch.arange(N) % C
    guide = torch.tensor([1e4, -1e4, 3e3, -3e3, 1.0, -1.0, 40.0, -40.0], dtype=torch.float64)
    terms = functional.disk_terms(student, teacher, target, guide, variant=variant, **SETTINGS)
    assert_equal_to_oracle(terms, oracle(student, teacher, target, guide, variant=variant, **SETTINGS))


@every_variant
@pytest.mark.parametrize("gap", [100.0, 1e3, 1e4])
def test_a_student_that_rules_out_classes_outside_the_top_k_equals_the_oracle(variant, gap):
    student = torch.tensor([[gap, 0.0, 0.0], [0.0, gap, 0.0]])
    teacher, target, guide = torch.tensor([[3.0, 2.0, 1.0]] * 2), torch.tensor([0, 2]), torch.zeros(2)
    settings = SETTINGS | {"variant": variant, "top_k": 1, "temperature": 1.0, "student_temperature": 1.0}
    expected = oracle(student, teacher, target, guide, **settings)
    terms = functional.disk_terms(student, teacher, target, guide, **settings)
    for name in FIELDS:
        assert getattr(terms, name).item() == pytest.approx(expected[name], rel=1e-5), name


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e4, -1e4, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [0.3, None])
@pytest.mark.parametrize("logits", ["moderate", "huge"])
def test_extreme_guide_logits_give_finite_loss_and_gradients(variant, dtype, value, scale, logits):
    student, teacher = (
        huge(N, C, dtype=dtype) if logits == "huge" else torch.randn(N, C, dtype=dtype) for _ in range(2)
    )
    student.requires_grad_()
    guide = torch.full((N,), value, dtype=dtype, requires_grad=True)
    for budget, reduction in itertools.product((0.1, 1e6), ("mean", "none")):
        settings = SETTINGS | {"budget": budget, "variant": variant, "guide_gradient_scale": scale}
        terms = functional.disk_terms(student, teacher, torch.arange(N) % C, guide, reduction=reduction, **settings)
        assert_finite(getattr(terms, name) for name in FIELDS)
        assert_finite(gradients(terms.loss.sum(), student, guide))
        assert (terms.guide.mean() == float(value > 0)).item()


@every_variant
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_guide_logit_equals_a_saturated_one(variant, value):
    student, teacher, target, _ = batch()
    infinite, finite = (torch.full((N,), x, dtype=torch.float64) for x in (value, math.copysign(1e4, value)))
    assert_same_terms(
        functional.disk_terms(student, teacher, target, infinite, variant=variant, **SETTINGS),
        functional.disk_terms(student, teacher, target, finite, variant=variant, **SETTINGS),
        **EXACT,
    )


# ---- NaN and inf are never hidden, and never stay --------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("top_k", [1, 2, None])
@pytest.mark.parametrize("use_logits", [True, False], ids=["guide reads logits", "guide reads features"])
def test_a_broken_teacher_gives_a_broken_loss(variant, value, top_k, use_logits):
    student, teacher, target, _ = batch(n=2 * C, dtype=torch.float32)
    features = torch.randn(2 * C, D)
    disk = DiSKLoss(GuideHead(C, D, use_logits=use_logits), variant=variant, top_k=top_k)
    teacher[range(C), range(C)] = value  # in row i it is class i, the rows from C on are sound
    none = disk.terms(student, teacher, target, features, reduction="none")
    for name in HALVES:
        assert not getattr(none, name)[:C].isfinite().any(), name
        assert getattr(none, name)[C:].isfinite().all(), name
    for row in range(C):
        part = slice(row, None, C)
        mean = disk.terms(student[part], teacher[part], target[part], features[part])
        for name in HALVES:
            assert not getattr(mean, name).isfinite(), (name, row)


@every_variant
@pytest.mark.parametrize(
    ("which", "value"),
    [("student", math.nan), ("student", math.inf), ("guide", math.nan), ("weight", math.nan), ("weight", math.inf)],
)
def test_a_broken_student_guide_or_weight_gives_a_broken_loss(variant, which, value):
    student, teacher, target, guide = (tensor.detach() for tensor in batch())
    weight = torch.ones(N, dtype=torch.float64)
    {"student": student[:, 1], "guide": guide, "weight": weight}[which][3] = value
    loss = functional.disk_loss(student, teacher, target, guide, variant=variant, sample_weight=weight, **SETTINGS)
    assert not loss.isfinite()


@every_variant
@pytest.mark.parametrize(
    ("which", "value"),
    [
        ("student", math.nan),
        ("student", math.inf),
        ("teacher", math.nan),
        ("teacher", math.inf),
        ("teacher", -math.inf),
    ],
)
@pytest.mark.parametrize("first", [False, True], ids=["in between", "at the start"])
def test_a_broken_batch_does_not_stay_in_statistics_or_fitted_temperature(variant, which, value, first):
    disk = make_loss(variant=variant, student_temperature="fit")
    twin = copy.deepcopy(disk)
    good = [batch()[:3] for _ in range(2)]
    student, teacher, target = batch()[:3]
    broken = changed(student, (torch.tensor(2), torch.tensor(1)), value) if which == "student" else student
    broken_teacher = changed(teacher, (torch.tensor(2), torch.tensor(1)), value) if which == "teacher" else teacher
    for position, inputs in enumerate(good):
        if position == (0 if first else 1):
            assert not disk(broken, broken_teacher.detach(), target).isfinite()
        loss = disk(*inputs)
        expected = twin(*inputs)
    assert_finite([loss, *gradients(loss, *players(disk, good[1][0]))])
    if value == -math.inf and which == "teacher":  # softmax takes it for a class of probability 0: a fit exists
        assert_finite(disk.state_dict().values())
        assert 1.0 <= disk.student_temperature.item() <= 16.0
        return
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(disk.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert disk.statistics() == twin.statistics()


def test_a_broken_teacher_leaves_the_statistics_of_a_guide_that_reads_features_finite():
    disk = DiSKLoss(GuideHead(C, D, use_logits=False), student_temperature="fit").double()
    student, teacher, target, _ = batch()
    teacher[3, 2] = math.nan
    disk(student, teacher, target, torch.randn(N, D))
    disk(*batch()[:3], torch.randn(N, D))
    assert all(math.isfinite(value) for value in disk.statistics())
    assert disk.student_temperature.isfinite()


# ---- reduction -------------------------------------------------------------------------------------------------------


@every_variant
@every_position
@pytest.mark.parametrize("settings", [SETTINGS, SLACK], ids=["violated", "slack"])
@pytest.mark.parametrize("scale", [0.3, None])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_per_position_terms_sum_to_the_mean_and_so_do_their_gradients(variant, positions, settings, scale, soft):
    student, teacher, target, guide = batch(positions)
    weight = torch.rand(N, *positions, dtype=torch.float64)
    count = target.numel()
    if soft:
        target = mixup(target)
    else:
        target[3] = -100
        count -= target[3].numel()
    settings = settings | {"variant": variant, "guide_gradient_scale": scale, "sample_weight": weight}
    mean = functional.disk_terms(student, teacher, target, guide, **settings)
    none = functional.disk_terms(student, teacher, target, guide, reduction="none", **settings)
    assert (mean.usage > settings["budget"]).item() == (settings["budget"] == SETTINGS["budget"])
    for name in FIELDS:
        assert getattr(none, name).shape == guide.shape, name
        assert getattr(mean, name).shape == (), name
        torch.testing.assert_close(getattr(none, name).sum() / count, getattr(mean, name), msg=name, **EXACT)
    torch.testing.assert_close(
        gradients(none.loss.sum() / count, student, guide), gradients(mean.loss, student, guide), **EXACT
    )
    torch.testing.assert_close(
        gradients(none.student_loss.sum() / count, student), gradients(mean.student_loss, student), **EXACT
    )
    torch.testing.assert_close(
        gradients(none.guide_loss.sum() / count, guide), gradients(mean.guide_loss, guide), **EXACT
    )


@every_variant
@pytest.mark.parametrize("share", [0.5, 1.2], ids=["violated", "slack"])
def test_the_budget_is_that_of_the_batch_and_not_of_each_position(variant, share):
    student, teacher, target, guide = batch()
    settings = SETTINGS | {"variant": variant, "guide_gradient_scale": None}
    spent = functional.disk_terms(student, teacher, target, guide, reduction="none", **settings).usage
    settings["budget"] = share * spent.mean().item()
    assert (spent > settings["budget"]).any()
    assert (spent < settings["budget"]).any()
    found = torch.autograd.grad(functional.disk_loss(student, teacher, target, guide, **settings), guide)[0]
    settings.pop("guide_gradient_scale")
    for i, step in enumerate(1e-5 * torch.eye(N, dtype=torch.float64)):
        above, below = (oracle(student, teacher, target, guide + s, **settings)["loss"] for s in (step, -step))
        assert found[i].item() == pytest.approx((above - below) / 2e-5, rel=1e-6, abs=1e-8)


@every_variant
@every_position
def test_the_module_reduces_as_the_function_and_counts_the_same_statistics(variant, positions):
    student, teacher, target, _ = batch(positions)
    target[1] = -100
    disk = make_loss(variant=variant, **SETTINGS)
    twin = copy.deepcopy(disk)
    mean, none = disk.terms(student, teacher, target), twin.terms(student, teacher, target, reduction="none")
    count = (target != -100).sum()
    for name in FIELDS:
        torch.testing.assert_close(getattr(none, name).sum() / count, getattr(mean, name), msg=name, **EXACT)
    assert twin.statistics() == pytest.approx(disk.statistics(), rel=1e-12)
    assert disk.statistics().usage == pytest.approx(mean.usage.item(), rel=1e-12)


# ---- batches in parts, repeated, permuted ----------------------------------------------------------------------------


@every_position
@pytest.mark.parametrize("budget", [0.0, 100.0], ids=["violated", "slack"])
@pytest.mark.parametrize("scale", [0.3, None])
@pytest.mark.parametrize("split", [4, 3])
def test_parts_of_a_batch_combine_by_their_counts(positions, budget, scale, split):
    student, teacher, target, guide = batch(positions)
    target[-1] = -100
    weight = torch.rand(N, dtype=torch.float64)
    settings = SETTINGS | {"budget": budget, "guide_gradient_scale": scale}

    def part(where):
        inputs = student[where], teacher[where], target[where], guide[where]
        terms = functional.disk_terms(*inputs, sample_weight=weight[where], **settings)
        return terms, (target[where] != -100).sum() / (target != -100).sum()

    full = functional.disk_terms(student, teacher, target, guide, sample_weight=weight, **settings)
    (first, a), (second, b) = part(slice(split)), part(slice(split, None))
    for name in FIELDS:
        combined = a * getattr(first, name).double() + b * getattr(second, name)
        torch.testing.assert_close(combined, getattr(full, name), msg=name, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        gradients(a.double() * first.loss + b.double() * second.loss, student, guide),
        gradients(full.loss, student, guide),
        rtol=1e-6,
        atol=1e-7,
    )


@every_variant
@pytest.mark.parametrize("budget", [0.0, 100.0], ids=["violated", "slack"])
def test_half_batches_with_as_many_errors_each_average_to_the_full_batch(variant, budget):
    student, teacher, target, _ = batch()
    target[::2] = student[::2].argmax(1)
    target[1::2] = (student[1::2].argmax(1) + 1) % C
    disk = make_loss(variant=variant, **SETTINGS | {"budget": budget})
    full = disk.terms(student, teacher, target)
    first, second = (disk.terms(student[h], teacher[h], target[h]) for h in (slice(4), slice(4, None)))
    for name in FIELDS:
        average = (getattr(first, name) + getattr(second, name)) / 2
        torch.testing.assert_close(average, getattr(full, name), msg=name, **EXACT)
    torch.testing.assert_close(
        gradients((first.loss + second.loss) / 2, *players(disk, student)),
        gradients(full.loss, *players(disk, student)),
        **EXACT,
    )


@every_variant
@every_position
@pytest.mark.parametrize("budget", [0.0, 100.0], ids=["violated", "slack"])
def test_repeating_the_batch_changes_no_mean(variant, positions, budget):
    student, teacher, target, guide = batch(positions)
    settings = SETTINGS | {"variant": variant, "budget": budget}
    once = functional.disk_terms(student, teacher, target, guide, **settings)
    assert once.correct.item() < 1  # of errors there is at least one, so that their clamp is out of play
    repeated = [torch.cat([tensor] * 3) for tensor in (student, teacher, target, guide)]
    thrice = functional.disk_terms(*repeated, **settings)
    assert_same_terms(thrice, once, **EXACT)
    torch.testing.assert_close(gradients(thrice.loss, student, guide), gradients(once.loss, student, guide), **EXACT)


@every_variant
@every_position
def test_permuting_the_batch_permutes_the_terms(variant, positions):
    student, teacher, target, _ = batch(positions)
    weight, order = torch.rand(N, dtype=torch.float64), torch.randperm(N)
    disk = make_loss(variant=variant, **SETTINGS)
    plain = disk.terms(student, teacher, target, sample_weight=weight, reduction="none")
    shuffled = disk.terms(student[order], teacher[order], target[order], sample_weight=weight[order], reduction="none")
    for name in FIELDS:
        torch.testing.assert_close(getattr(shuffled, name), getattr(plain, name)[order], msg=name, **EXACT)


@every_position
@pytest.mark.parametrize("which", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("settings", [SETTINGS, SLACK], ids=["violated", "slack"])
def test_a_constant_added_to_the_logits_of_a_row_changes_nothing(positions, which, settings):
    inputs = list(batch(positions))
    student, guide = inputs[0], inputs[3]
    before = functional.disk_terms(*inputs, **settings)
    inputs[which] = inputs[which] + 10 * torch.randn(N, 1, *positions).double()
    after = functional.disk_terms(*inputs, **settings)
    assert_same_terms(after, before, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        gradients(after.loss, student, guide), gradients(before.loss, student, guide), rtol=1e-9, atol=1e-11
    )
