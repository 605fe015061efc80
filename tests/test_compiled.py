"""The loss under torch.compile, which has formulas of its own, against the loss without."""

from functools import partial

import pytest
import torch

from disk_plugin import functional

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
# of the student's logits, the teacher's and the guide's
SCALES = {"ordinary": (3.0, 3.0, 1.0), "far apart": (100.0, 100.0, 30.0), "enormous": (1e4, 1e4, 200.0)}


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


def compiled(settings, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(terms_of(settings), fullgraph=True, backend=backend, dynamic=False)


def terms_of(settings):
    return lambda *inputs: functional.disk_terms(*inputs, **settings)


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_compiled_terms_and_gradients_are_those_without(settings, scales):
    inputs = batch(scales)
    expected, found = everything(terms_of(settings), inputs), everything(compiled(settings), inputs)
    assert all(value.isfinite().all() for value in expected)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.13's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["default", "official_cifar"])
def test_inductor_agrees_where_there_is_a_cpp_compiler(name, dtype):
    inputs, settings = batch(dtype=dtype, shape=(40, 100)), SETTINGS[name]
    try:
        found = everything(compiled(settings, "inductor"), inputs)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no working C++ compiler: {error}")
    torch.testing.assert_close(found, everything(terms_of(settings), inputs), rtol=5e-6, atol=1e-6)


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
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_dense_logits_compile_too():
    student, teacher, target, _ = batch(shape=(5, 7, 2, 3))
    inputs = student, teacher, target, torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    expected, found = everything(terms_of({}), inputs), everything(compiled({}), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(broken, value):
    inputs = batch()
    inputs[broken].data[0, 0] = value
    assert not compiled({})(*inputs).loss.isfinite()


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}])
def test_a_class_that_the_student_rules_out_is_no_harm(settings):
    student, teacher, target, guide = batch()
    teacher.data[:, 0] = 9.0  # among the scaffolded ones
    student.data[:, 0], target[target <= 0] = -torch.inf, 1
    expected = everything(terms_of(settings), (student, teacher, target, guide))
    found = everything(compiled(settings), (student, teacher, target, guide))
    assert all(value.isfinite().all() for value in expected)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
