"""Class weights and label smoothing: torch's own cross-entropy, and nothing else of the objective."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, GuideHead, functional
from disk_plugin.functional import disk_loss, disk_terms, kd_loss
from disk_plugin.variants import VARIANTS

N, C = 7, 5
OPTIONS = {
    "weight": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)},
    "smoothing": {"label_smoothing": 0.3},
    "both": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64), "label_smoothing": 0.1},
}
TARGETS = ("indices", "ignored", "probabilities")
ALONE = {"ce_weight": 1.0, "distill_weight": 0.0}  # of the loss the cross-entropy alone


def batch(target="ignored", positions=(), ignore_index=-100):
    student, teacher = (3 * torch.randn(N, C, *positions, dtype=torch.float64) for _ in range(2))
    found = torch.randint(1, C, (N, *positions))
    if target == "ignored":
        found[2] = ignore_index
    elif target == "probabilities":
        found = torch.randn(N, C, *positions, dtype=torch.float64).softmax(1)
    return student.requires_grad_(), teacher, found, torch.randn(N, *positions, dtype=torch.float64).requires_grad_()


def kd(student, teacher, target, guide, **settings):
    return kd_loss(student, teacher, target, **settings)


def disk(*inputs, **settings):
    return disk_loss(*inputs, multiplier=0.0, **settings)


def both(value, *inputs):
    return value, torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("loss", [kd, disk])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("positions", [(), (2, 3)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sums_and_single_values_are_torchs_with_its_gradient(loss, name, target, positions, reduction):
    inputs = batch(target, positions)
    found = loss(*inputs, **ALONE, **OPTIONS[name], reduction=reduction)
    expected = F.cross_entropy(inputs[0], inputs[2], reduction=reduction, **OPTIONS[name])
    torch.testing.assert_close(both(found, inputs[0]), both(expected, inputs[0]))


@pytest.mark.parametrize("loss", [kd, disk])
@pytest.mark.parametrize("target", TARGETS)
def test_the_mean_divides_by_the_positions_and_so_is_torchs_but_for_weights_with_class_indices(loss, target):
    inputs = batch(target)
    for options in OPTIONS.values():
        expected = F.cross_entropy(inputs[0], inputs[2], **options)
        if "weight" in options and target != "probabilities":
            counted = inputs[2][inputs[2] != -100]
            expected = expected * options["weight"][counted].sum() / len(counted)
        found = loss(*inputs, **ALONE, **options)
        torch.testing.assert_close(both(found, inputs[0]), both(expected, inputs[0]))


@pytest.mark.parametrize("loss", [kd, disk])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_another_ignore_index_is_ignored_whatever_stands_there(loss, poison):
    student, teacher, target, guide = batch("ignored", ignore_index=0)
    expected = both(F.cross_entropy(student, target, ignore_index=0, reduction="sum", **OPTIONS["both"]), student)
    broken = student.detach().clone()
    broken[2] = poison
    inputs = broken.requires_grad_(), teacher, target, guide
    found = loss(*inputs, **ALONE, **OPTIONS["both"], ignore_index=0, reduction="sum")
    torch.testing.assert_close(both(found, broken), expected)


@pytest.mark.parametrize("loss", [kd, disk])
def test_a_label_that_is_no_class_stays_an_error_under_another_ignore_index(loss):
    student, teacher, target, guide = batch("indices")
    target[0] = -100
    with pytest.raises(ValueError, match=r"class indices in \[0, .* or ignore_index=255, got -100"):
        loss(student, teacher, target, guide, ignore_index=255, **OPTIONS["both"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hold_discount", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_the_cross_entropy_changes(variant, hold_discount, name, target):
    inputs = student, _, _, guide = batch(target)
    settings = {"variant": variant, "hold_discount": hold_discount, "top_k": 2, "budget": 0.05}
    plain, changed = (
        disk_terms(*inputs, **settings, **options, ce_weight=0.5, reduction="none") for options in ({}, OPTIONS[name])
    )
    for field in set(plain._fields) - {"loss", "student_loss", "ce", "logged_loss"}:
        torch.testing.assert_close(getattr(changed, field), getattr(plain, field), rtol=0, atol=0)
    assert (changed.ce != plain.ce).any()
    torch.testing.assert_close(changed.logged_loss - plain.logged_loss, 0.5 * (changed.ce - plain.ce))
    (ours, guides), (theirs, same) = (both(terms.loss, student, guide)[1] for terms in (changed, plain))
    torch.testing.assert_close(guides, same, rtol=0, atol=0)
    expected = [F.cross_entropy(student, inputs[2], reduction="sum", **options) for options in (OPTIONS[name], {})]
    torch.testing.assert_close(ours - theirs, 0.5 * both(expected[0] - expected[1], student)[1][0])


@pytest.mark.parametrize("target", TARGETS)
def test_defaults_and_ones_change_nothing(target):
    inputs = batch(target)
    plain = both(disk_loss(*inputs), inputs[0], inputs[3])
    same = both(disk_loss(*inputs, weight=None, label_smoothing=0), inputs[0], inputs[3])
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    ones = both(disk_loss(*inputs, weight=torch.ones(C)), inputs[0], inputs[3])
    torch.testing.assert_close(ones, plain)


def test_the_sample_weight_multiplies_what_the_class_weight_gives():
    student, teacher, target, guide = batch("indices")
    sample_weight = torch.rand(N, dtype=torch.float64)
    terms = disk_terms(
        student, teacher, target, guide, sample_weight=sample_weight, reduction="none", **OPTIONS["both"]
    )
    expected = sample_weight * F.cross_entropy(student, target, reduction="none", **OPTIONS["both"])
    torch.testing.assert_close(terms.ce, expected.detach())


# ---- the module ------------------------------------------------------------------------------------------------------


def make_loss(**settings):
    torch.manual_seed(1)
    return DiSKLoss(GuideHead(C, hidden_dims=(4,)), **{"ce_weight": 0.5, **settings})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_module_equals_function(options, reduction):
    student, teacher, target, _ = batch()
    module = make_loss(budget=0.3, **options).double().eval()
    shared = {name: getattr(module, name) for name in ("ce_weight", "distill_weight", "temperature", "budget")}
    expected = disk_terms(
        student, teacher, target, module.guide(teacher), **shared, multiplier=50.0, **options, reduction=reduction
    )
    found = module.terms(student, teacher, target, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_weight_is_a_buffer_where_there_is_one():
    assert "weight" not in make_loss().state_dict()
    assert make_loss().weight is None
    given = torch.tensor([0.1, 2.0, 1.0, 0.0, 3.0])
    module = make_loss(weight=given)
    assert "weight" in module.state_dict()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = make_loss(weight=torch.ones(C))
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other.weight.float(), given, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(module).bfloat16().weight.float(), given, rtol=0, atol=0)  # not rounded
    assert module.to("meta").weight.is_meta
    assert given[0] == 0.1


def test_a_loss_built_on_the_meta_device_keeps_the_weight():
    given = torch.tensor([0.1, 2.0, 1.0, 0.0, 3.0])
    with torch.device("meta"):
        module = make_loss(weight=given)
    torch.testing.assert_close(module.to_empty(device="cpu").weight.float(), given, rtol=0, atol=0)


def test_smoothing_is_shown_where_there_is_any_and_may_be_assigned():
    assert "label_smoothing" not in repr(make_loss())
    assert "label_smoothing=0.1" in repr(make_loss(label_smoothing=0.1))
    module, (student, teacher, target, _) = make_loss(), batch()
    module.label_smoothing = 0.3
    expected = make_loss(label_smoothing=0.3)(student, teacher, target)
    torch.testing.assert_close(module(student, teacher, target), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_upcast(dtype):
    student, teacher, target, _ = (x.detach().to(dtype) if x.is_floating_point() else x for x in batch("indices"))
    weight = OPTIONS["both"]["weight"].to(dtype)
    found = make_loss(weight=weight, label_smoothing=0.1)(student, teacher, target)
    expected = make_loss(weight=weight.float(), label_smoothing=0.1)(student.float(), teacher.float(), target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_in_one_graph(target):
    torch.compiler.reset()
    student, teacher, target, _ = batch(target)
    module = make_loss(**OPTIONS["both"]).double()
    expected, found = (
        both(each(student, teacher, target), student)
        for each in (copy.deepcopy(module), torch.compile(module, fullgraph=True, backend="aot_eager"))
    )
    torch.testing.assert_close(found, expected)


def test_it_maps_over_students():
    _, teacher, target, _ = batch()
    module = make_loss(**OPTIONS["both"]).double().eval()
    students = torch.randn(3, N, C, dtype=torch.float64)
    found = torch.vmap(lambda student: module(student, teacher, target))(students)
    torch.testing.assert_close(found, torch.stack([module(student, teacher, target) for student in students]))


# ---- errors ----------------------------------------------------------------------------------------------------------

SMOOTHING_REFUSED = [
    (1.5, ValueError, "label_smoothing must be >= 0 and < 1, got 1.5"),
    (1, ValueError, "label_smoothing must be >= 0 and < 1, got 1"),
    (-0.1, ValueError, "label_smoothing must be >= 0 and < 1, got -0.1"),
    (torch.nan, ValueError, "label_smoothing must be finite, got nan"),
    ("0.1", TypeError, "label_smoothing must be a number, got str '0.1'"),
    (True, TypeError, "label_smoothing must be a number, got bool True"),
    (torch.tensor(0.1), TypeError, "label_smoothing must be a number, got Tensor"),
    (None, TypeError, "label_smoothing must be a number, got NoneType None"),
]
FUNCTIONS = (kd, disk_loss, functional.reference_terms)


@pytest.mark.parametrize(("value", "error", "message"), SMOOTHING_REFUSED)
def test_bad_label_smoothing_passed(value, error, message):
    for call in (*FUNCTIONS, lambda *_, **settings: make_loss(**settings)):
        with pytest.raises(error, match=f"^{message}$"):
            call(*batch(), label_smoothing=value)


WEIGHT_REFUSED = [
    (torch.ones(5, 1), ValueError, r"weight must have shape \(C,\)( = \(5,\))?, got \(5, 1\)"),
    (torch.tensor(1.0), ValueError, r"weight must have shape \(C,\)( = \(5,\))?, got \(\)"),
    (torch.ones(5).long(), TypeError, r"weight must be floating-point, got torch.int64"),
    ([1.0] * 5, TypeError, "weight must be a Tensor, got list"),
    (2.0, TypeError, "weight must be a Tensor, got float"),
]


@pytest.mark.parametrize(("value", "error", "message"), WEIGHT_REFUSED)
def test_bad_weight_passed(value, error, message):
    for call in (*FUNCTIONS, lambda *_, **settings: make_loss(**settings)):
        with pytest.raises(error, match=f"^{message}$"):
            call(*batch(), weight=value)


def test_a_weight_of_another_number_of_classes_passed():
    inputs = batch()
    module = make_loss(weight=torch.ones(4))
    for call in (*FUNCTIONS, lambda *inputs, weight: module(*inputs[:3])):
        with pytest.raises(ValueError, match=r"^weight must have shape \(C,\) = \(5,\), got \(4,\)$"):
            call(*inputs, weight=torch.ones(4))


def test_a_weight_that_requires_grad_is_a_constant():
    student, teacher, target, guide = batch()
    weight = nn.Parameter(torch.ones(C))
    kd_loss(student, teacher, target, weight=weight).backward()
    disk_loss(student, teacher, target, guide, weight=weight).backward()
    assert weight.grad is None
