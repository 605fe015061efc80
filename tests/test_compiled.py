"""The loss under torch.compile, which has formulas of its own, against the loss without."""

import copy
import os
import shutil
from functools import partial

import pytest
import torch

from disk_plugin import DiSKLoss, GuideHead, functional

SETTINGS = {
    "default": {},
    "temperature 2": {"temperature": 2.0},
    "temperature 1": {"temperature": 1.0},
    "two temperatures": {"temperature": 1.5, "student_temperature": 2.5},
    "temperature in a tensor": {"student_temperature": torch.tensor(2.7)},
    "larger power": {"temperature": 9.0},
    "top-3": {"top_k": 3},
    "official_cifar": {"top_k": 3, "variant": "official_cifar"},
    "official_imagenet": {"top_k": 3, "variant": "official_imagenet"},
    "no distillation": {"distill_weight": 0.0},
    "no cross-entropy": {"ce_weight": 0.0},
    "per sample": {"reduction": "none"},
}
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-14}
# of the student's logits, the teacher's and the guide's
EXTREMES = {"far apart": (100.0, 100.0, 30.0), "enormous": (1e4, 1e4, 200.0)}


def batch(scales=(3.0, 3.0, 1.0), dtype=torch.float64, shape=(9, 13)):
    torch.manual_seed(0)
    student, teacher, guide = (scale * torch.randn(shape, dtype=dtype) for scale in scales)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target[3] = -100
    return student.requires_grad_(), teacher, target, guide[:, 0].clone().requires_grad_()


def everything(terms_of, inputs):
    """All terms and both gradients."""
    terms = terms_of(*inputs)
    student, _, _, guide = inputs
    return *(term.detach() for term in terms), *torch.autograd.grad(terms.loss.sum(), (student, guide))


def assert_close(found, expected):
    """Equal but for rounding, which is that of the largest of a tensor's values."""
    for one, other in zip(found, expected, strict=True):
        tolerance = TOLERANCES[other.dtype] * max(other.abs().max().item(), 1.0)
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def compiled(settings, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(terms_of(settings), fullgraph=True, backend=backend, dynamic=False)


def terms_of(settings):
    return lambda *inputs: functional.disk_terms(*inputs, **settings)


def agrees(settings, inputs):
    expected, found = everything(terms_of(settings), inputs), everything(compiled(settings), inputs)
    assert all(value.isfinite().all() for value in expected)
    assert_close(found, expected)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_compiled_terms_and_gradients_are_those_without(settings):
    agrees(settings, batch())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scales", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("name", ["default", "two temperatures", "official_cifar"])
def test_extreme_logits_give_the_same_too(name, scales, dtype):
    agrees(SETTINGS[name], batch(scales, dtype))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.13's own
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler: g++, or what CXX names"
)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["default", "official_cifar"])
def test_inductor_agrees_where_there_is_a_cpp_compiler(name, dtype):
    inputs, settings = batch(dtype=dtype, shape=(40, 100)), SETTINGS[name]
    found, expected = everything(compiled(settings, "inductor"), inputs), everything(terms_of(settings), inputs)
    assert_close(found, expected)


def test_sizes_and_numbers_may_change_between_calls():
    def terms_of_temperature(temperature, *inputs):
        return functional.disk_terms(*inputs, temperature=temperature)

    torch.compiler.reset()
    compiled = torch.compile(terms_of_temperature, fullgraph=True, backend="aot_eager")
    for count, temperature in ((9, 4.0), (7, 4.0), (5, 3.0), (5, 2.5), (1, 1.0)):
        student, teacher, target, guide = (value[:count] for value in batch())
        inputs = student.detach().requires_grad_(), teacher, target, guide.detach().requires_grad_()
        expected, found = (
            everything(partial(function, temperature), inputs) for function in (terms_of_temperature, compiled)
        )
        assert_close(found, expected)


def test_dense_logits_compile_too():
    student, teacher, target, _ = batch(shape=(5, 7, 2, 3))
    inputs = student, teacher, target, torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    agrees({}, inputs)


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(broken, value):
    inputs = batch()
    inputs[broken].data[0, 0] = value
    assert not compiled({})(*inputs).loss.isfinite()


def test_a_class_that_the_student_rules_out_off_the_mask_harms_no_other():
    student, teacher, target, guide = batch()
    teacher.data[:, 0] = -9.0  # not among the scaffolded ones
    student.data[0, 0], target[target <= 0] = -torch.inf, 1
    settings, inputs = {"top_k": 2, "reduction": "none"}, (student, teacher, target, guide)
    for evaluate in (terms_of(settings), compiled(settings)):
        terms = evaluate(*inputs)
        assert terms.loss.isfinite().tolist() == [False] + 8 * [True]
        gradients = torch.autograd.grad(terms.loss.sum(), (student, guide))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_second_derivatives_are_refused():
    student, teacher, target, guide = batch()
    loss = compiled({})(student, teacher, target, guide).loss
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    # torch 2.4 refuses it as what has no gradient
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|does not require grad"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}])
def test_a_class_that_the_student_rules_out_is_no_harm(settings):
    student, teacher, target, guide = batch()
    teacher.data[:, 0] = 9.0  # among the scaffolded ones
    student.data[:, 0], target[target <= 0] = -torch.inf, 1
    agrees(settings, (student, teacher, target, guide))


def test_terms_of_the_module_compile_in_one_graph():
    torch.compiler.reset()
    disk = DiSKLoss(GuideHead(13)).double()
    student, teacher, target, _ = batch()
    twin = copy.deepcopy(disk)  # each batch moves the level
    expected = disk.terms(student, teacher, target)
    found = torch.compile(twin.terms, fullgraph=True, backend="aot_eager")(student, teacher, target)
    assert_close([value.detach() for value in found], [value.detach() for value in expected])


@pytest.mark.parametrize("settings", [{}, {"student_temperature": "fit"}], ids=["default", "fit"])
def test_a_compiled_loss_moves_its_buffers_as_one_that_is_not(settings):
    torch.compiler.reset()
    disk = DiSKLoss(GuideHead(13), **settings).double()
    before, twin = copy.deepcopy(disk.state_dict()), copy.deepcopy(disk)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(*batch()[:3])
        disk(*batch()[:3])
    torch.testing.assert_close(twin.state_dict(), disk.state_dict())
    scalars = ["level.agreement", "level.centre", *(["fitted_student_temperature"] if settings else [])]
    assert all(twin.state_dict()[name] != before[name] for name in scalars)


@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "nothing requires grad"])
def test_a_compiled_loss_evaluates_where_there_is_no_gradient_to_take(frozen):
    torch.compiler.reset()
    torch.manual_seed(0)
    disk = DiSKLoss(GuideHead(5)).eval()
    inputs = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(disk, fullgraph=True, backend="aot_eager")
    if frozen:
        disk.requires_grad_(False)
        torch.testing.assert_close(compiled(*inputs), disk(*inputs))
    else:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), disk(*inputs))
