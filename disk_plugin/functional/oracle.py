"""The per-sample optimum of (5) for a frozen student: an oracle to compare a trained guide with."""

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from .. import _checks
from ._positions import get_positions, promote
from .budget import usage
from .cross_entropy import label_cross_entropy
from .scaffold import scaffold_mask, temperatures

_HALVINGS = 60  # of [0, 1]: below the rounding of float64


@torch.no_grad()
def optimal_guide(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    multiplier: float | Tensor,
    distill_weight: float = 0.9,
    temperature: float = 4.0,
    student_temperature: float | Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    r"""Return the g in [0, 1] that minimises (1-alpha) L_dist + multiplier * g * CE, independently per target.

    $$\tau\tau_s (1-\alpha) \sum_{k \in K} t_k / (s_k + g) = \mu\, CE$$

    The left side decreases in g, so bisection finds the root; g is 1 if the left side is always larger, 0 if it is
    always smaller. While the budget binds, the hinge of (3) acts as this multiplier. It is for the paper's variant, and
    an oracle, not a replacement for the guide, which is smooth in the teacher's features. There is no
    ``ignore_index``: pass no ignored targets.

    Args:
        student_logits: before softmax.
        teacher_logits: before softmax.
        target: class indices, or probabilities, whose argmax is used.
        multiplier: weight of g * CE, >= 0.
        distill_weight: weight of the scaffolded divergence, >= 0.
        temperature: divides the teacher's logits, > 0.
        student_temperature: divides the student's logits, > 0; None for ``temperature``.
        top_k: number of the teacher's largest classes that receive g; None for all.

    Shape:
        logits (N, C) or (N, C, d1, ...); target (N, d1, ...) or the logits'; returns (N,) or (N, d1, ...).

    Raises:
        ValueError: shapes that do not fit, values out of range.
        TypeError: logits not floating-point, or a target that is neither int64 nor floating-point.
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.number("multiplier", multiplier, at_least=0)
    _checks.number("distill_weight", distill_weight, at_least=0)
    tau_s = temperatures(temperature, student_temperature)
    student, teacher = promote(student_logits, teacher_logits)
    s = softmax(student / tau_s, 1)
    t = softmax(teacher / temperature, 1) * scaffold_mask(teacher, top_k)
    label = get_positions(student, target).label
    price = multiplier * label_cross_entropy(log_softmax(student, 1), label)

    low, high = torch.zeros_like(price), torch.ones_like(price)
    for _ in range(_HALVINGS):
        g = (low + high) / 2
        gain = distill_weight * temperature * tau_s * (t / (s + g.unsqueeze(1))).sum(1)
        low, high = torch.where(gain > price, g, low), torch.where(gain > price, high, g)
    return (low + high) / 2 + 0 * (gain + price)  # NaN where an input is


@torch.no_grad()
def optimal_multiplier(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    budget: float | Tensor,
    distill_weight: float = 0.9,
    temperature: float = 4.0,
    student_temperature: float | Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Return the multiplier under which ``optimal_guide`` uses exactly the budget; 0 if g = 1 uses less.

    The optimum's usage decreases in the multiplier, so bisection over the logarithm finds it, between 1e-6 and 1e6.

    Args and Shape are those of ``optimal_guide``, with ``budget`` in nats per sample, > 0, instead of
    ``multiplier``; returns a scalar tensor.

    Raises:
        ValueError: shapes that do not fit, values out of range.
        TypeError: logits not floating-point, or a target that is neither int64 nor floating-point.
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.number("budget", budget, above=0)

    def spent(multiplier: Tensor) -> Tensor:
        g = optimal_guide(
            student_logits,
            teacher_logits,
            target,
            multiplier=multiplier,
            distill_weight=distill_weight,
            temperature=temperature,
            student_temperature=student_temperature,
            top_k=top_k,
        )
        return usage(student_logits, target, torch.logit(g))

    (student,) = promote(student_logits)
    zero = student.new_zeros(())
    low, high = zero - 6 * math.log(10), zero + 6 * math.log(10)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_much = spent(middle.exp()) > budget
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return torch.where(spent(zero) <= budget, zero, ((low + high) / 2).exp())
