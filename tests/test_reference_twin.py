"""The objective in plain autograd: the same values and gradients as the fast one, and second derivatives."""

import inspect
import random

import pytest
import torch

from disk_plugin import functional
from disk_plugin.functional import disk_terms, reference_terms
from disk_plugin.variants import VARIANTS

LOSSES = ("loss", "student_loss", "guide_loss")
LEFT_OUT = {"guide_gradient_scale", "hold_discount", "reduce_mean"}  # gradients of no value; batches that are parts
PLAIN = {"guide_gradient_scale": None}


def random_case(number):
    """Logits, target and guide logits of a seeded case, and its settings."""
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    n, c, spread = rng.randint(1, 7), rng.randint(2, 12), rng.choice([0.3, 1.0, 5.0, 20.0])
    positions = (n, *rng.choice([(), (), (3,), (2, 2)]))
    shape = (n, c, *positions[1:])
    student, teacher = (spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    guide = spread * torch.randn(positions, generator=generator, dtype=torch.float64)
    ignore_index = rng.choice([-100, 0])
    target = torch.randint(1, c, positions, generator=generator)
    if rng.random() < 0.25:
        target = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(1)
    elif rng.random() < 0.5:
        target[torch.rand(positions, generator=generator) < rng.choice([0.3, 0.3, 1.0])] = ignore_index
    weighed = rng.choice([None, positions, positions[:1]])
    settings = {
        "variant": list(VARIANTS)[number % 3],
        "ce_weight": rng.choice([0.0, 0.1, 0.5, 1.0]),
        "distill_weight": rng.choice([0.0, 0.5, 0.9]),
        "temperature": rng.choice([1.0, 2.0, 4.0]),
        "student_temperature": rng.choice([None, 1.0, 3.5, torch.tensor(2.7, dtype=torch.float64)]),
        "top_k": rng.choice([None, 1, 2, 3, 20]),
        "multiplier": rng.choice([0.0, 0.1, 5.0, 50.0]),
        "budget": rng.choice([0.0, 0.3, 2.0]),
        "ignore_index": ignore_index,
        "sample_weight": None if weighed is None else torch.rand(weighed, generator=generator, dtype=torch.float64),
        "weight": torch.rand(c, generator=generator, dtype=torch.float64) if rng.random() < 0.3 else None,
        "label_smoothing": rng.choice([0.0, 0.0, 0.1]),
        "reduction": rng.choice(["mean", "sum", "none"]),
    }
    return (student, teacher, target, guide), settings


def with_gradients(function, inputs, **settings):
    """All terms, and the gradients of each loss by student and guide, zeros where it has none."""
    student, teacher, target, guide = inputs
    student, guide = student.clone().requires_grad_(), guide.clone().requires_grad_()
    terms = function(student, teacher, target, guide, **settings)
    found = {name: value.detach() for name, value in terms._asdict().items()}
    upstream = torch.linspace(0.5, 2.0, terms.loss.numel(), dtype=torch.float64).reshape(terms.loss.shape)
    for name in LOSSES:
        to = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad((upstream * getattr(terms, name)).sum(), (student, guide), **to)
        found |= {f"{name} by student": gradients[0], f"{name} by guide": gradients[1]}
    return found


@pytest.mark.parametrize("number", range(240))
def test_values_and_gradients_are_those_of_disk_terms(number):
    inputs, settings = random_case(number)
    expected = with_gradients(disk_terms, inputs, **settings, **PLAIN)
    found = with_gradients(reference_terms, inputs, **settings)
    sizes = {name: value.abs().max().clamp(min=1.0) for name, value in expected.items()}
    found, expected = ({name: value / sizes[name] for name, value in each.items()} for each in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_student_and_guide_each_receive_only_their_own_gradient(variant):
    inputs, _ = random_case(3)
    found = with_gradients(reference_terms, inputs, variant=variant, budget=0.0, top_k=2)
    for player, other in (("student", "guide"), ("guide", "student")):
        assert found[f"{player}_loss by {player}"].abs().sum() > 0
        assert found[f"{player}_loss by {other}"].abs().sum() == 0
        torch.testing.assert_close(found[f"loss by {player}"], found[f"{player}_loss by {player}"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_can_be_differentiated_twice(variant, top_k, reduction):
    student, teacher = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))
    guide, target = torch.randn(4, dtype=torch.float64), torch.tensor([0, 4, -100, 2])

    def of(name):
        def loss(student, guide):
            settings = {"variant": variant, "top_k": top_k, "budget": 0.05, "reduction": reduction}
            return getattr(reference_terms(student, teacher, target, guide, **settings), name).sum()

        return loss

    student.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda logits: of("student_loss")(logits, guide), student)
    guide.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda logits: of("guide_loss")(student.detach(), logits), guide)
    (gradient,) = torch.autograd.grad(of("loss")(student, guide), student, create_graph=True)
    gradient.square().sum().backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


def test_a_hessian_by_torch_func_is_that_of_autograd():
    inputs, _ = random_case(0)
    student, *rest = inputs

    def loss(student):
        return reference_terms(student, *rest, top_k=2).loss

    expected = torch.autograd.functional.hessian(loss, student)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(student), expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_stands_at_ignored_positions_reaches_no_gradient(poison):
    student, teacher, target = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.tensor([0, -100, 2, 1])
    guide = torch.randn(4, dtype=torch.float64)
    expected = with_gradients(reference_terms, (student, teacher, target, guide))
    student[1], teacher[1], guide[1] = poison, poison, poison
    torch.testing.assert_close(with_gradients(reference_terms, (student, teacher, target, guide)), expected)


def test_its_arguments_and_defaults_are_those_of_disk_terms():
    fast, plain = (inspect.signature(function).parameters for function in (disk_terms, reference_terms))
    assert fast.keys() - plain.keys() == LEFT_OUT
    assert all(plain[name] == fast[name] for name in plain)


def test_disk_terms_and_its_refusal_of_a_second_derivative_point_to_it():
    assert "reference_terms" in disk_terms.__doc__
    student = torch.randn(2, 3, requires_grad=True)
    loss = functional.disk_loss(student, torch.randn(2, 3), torch.tensor([0, 1]), torch.zeros(2))
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use functional\.reference_terms"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"student_temperature": -1}, ValueError, "student_temperature must be > 0, got -1"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1, got 0"),
        ({"variant": "ours"}, ValueError, "variant must be one of"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"guide_logits": torch.zeros(3)}, ValueError, r"guide_logits must have shape \(2,\), got \(3,\)"),
        ({"target": torch.zeros(2)}, TypeError, "target must be int64"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    inputs = {"student_logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3)}
    inputs |= {"target": torch.tensor([0, 1]), "guide_logits": torch.zeros(2)} | change
    with pytest.raises(error, match=message):
        reference_terms(**inputs)
