"""What ``blocks`` evaluates, spelt for ``torch.compile``: no (N, C) tensor is written but the gradient.

A compiler fuses loops over the classes, but writes down what it takes to be dear, and memory is what costs here. So the
forward returns per-row values alone, and the backward evaluates the classes again, unless the compiler keeps them;
exponentials are powers of 2, as inductor writes down, on a CPU, every ``exp`` and ``sigmoid`` that is used twice, but
computes ``exp2`` anew; and scalars that are constants stay so.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._first_order import first_order

BITS = math.log2(math.e)  # of a nat
_LARGEST_POWER = 8


class _Scalars(NamedTuple):
    """Tensors without dimensions; the compiler sees through those made of a number."""

    student_rate: Tensor  # bits per unit of the student's logits: 1 / (tau_s log 2)
    teacher_rate: Tensor
    ce_weight: Tensor
    kl_weight: Tensor


class _Row(NamedTuple):
    """What the backward needs of each row, (N, 1)."""

    student_peak: Tensor  # the largest logit
    student_norm: Tensor  # sum_y 2^((logit_y - peak) rate)
    teacher_peak: Tensor
    teacher_norm: Tensor
    soft_weight: Tensor  # of 2^((logit_y - peak) rate) in the gradient
    plain_weight: Tensor  # of e^(logit_y - peak) in the gradient


class _Classes(NamedTuple):
    """What the guide leaves and takes, (N, C)."""

    target: Tensor  # t
    log_ratio: Tensor  # log2 t / (s + g)
    taken: Tensor  # t g / (s + g)
    left: Tensor  # w = t s / (s + g); not t - taken, which cancels where g is far above s


def fused_rows(
    student: Tensor,
    teacher: Tensor,
    log_guide: Tensor,
    label: Tensor,
    mask: Tensor | None,
    ce_weight: float,
    kl_weight: float | Tensor,
    temperature: float,
    student_temperature: float | Tensor,
    zero_outside: bool,
) -> tuple[Tensor, ...]:
    """Return the fields of ``blocks.Rows``; the arguments are those of ``blocks.rows``."""
    if zero_outside and mask is not None:
        teacher = torch.where(mask, teacher, temperature * teacher.amin(1, keepdim=True))
    numbers = (BITS / student_temperature, BITS / temperature, ce_weight, kl_weight)
    scalars = (number if isinstance(number, Tensor) else student.new_full((), number) for number in numbers)
    power = None  # the plain softmax is a power of the softened one: multiplications instead of an exponential
    if not isinstance(student_temperature, Tensor) and student_temperature in range(1, _LARGEST_POWER + 1):
        power = int(student_temperature)
    found = _FusedRows.apply(student, teacher, log_guide, label, mask, zero_outside, power, *scalars)
    return found[: -len(_Row._fields)]  # type: ignore[no-any-return]


class _FusedRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        log_guide: Tensor,
        label: Tensor,
        mask: Tensor | None,
        zero_outside: bool,
        power: int | None,
        *numbers: Tensor,
    ) -> tuple[Tensor, ...]:
        scalars = _Scalars(*numbers)
        student_peak, teacher_peak = student.amax(1, keepdim=True), teacher.amax(1, keepdim=True)
        soft, plain = _powers(student - student_peak, scalars.student_rate, power)
        student_norm, plain_norm = soft.sum(1, keepdim=True), plain.sum(1, keepdim=True)
        teacher_norm = ((teacher - teacher_peak) * scalars.teacher_rate).exp2().sum(1, keepdim=True)
        row = _Row(student_peak, student_norm, teacher_peak, teacher_norm, student_norm, plain_norm)
        each = _classes(student, teacher, log_guide, mask, zero_outside, scalars, row)
        kl = (each.target * each.log_ratio).sum(1) / BITS
        ce = plain_norm.log() - (student.gather(1, label) - student_peak)
        removed, left = each.taken.sum(1), each.left.sum(1, keepdim=True)
        # the last term is for the compiler: it sums what the forward does not need in another loop, in the backward
        objective = scalars.ce_weight * ce[:, 0] + scalars.kl_weight * kl + 0 * (removed + left[:, 0])
        row = row._replace(
            soft_weight=scalars.kl_weight * scalars.student_rate / BITS * left / student_norm,
            plain_weight=scalars.ce_weight / plain_norm,
        )
        return objective, ce, kl, removed, each.target.sum(1), student.argmax(1), *row

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, teacher, log_guide, label, mask, ctx.zero_outside, ctx.power, *numbers = inputs
        row = output[-len(_Row._fields) :]
        ctx.save_for_backward(student, teacher, log_guide, label, mask, output[3], *numbers, *row)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        student, teacher, log_guide, label, mask, removed, *saved = ctx.saved_tensors
        scalars, row = _Scalars(*saved[: len(_Scalars._fields)]), _Row(*saved[len(_Scalars._fields) :])
        to_student = to_guide = None
        if upstream is not None and ctx.needs_input_grad[0]:
            soft, plain = _powers(student - row.student_peak, scalars.student_rate, ctx.power)
            left = _classes(student, teacher, log_guide, mask, ctx.zero_outside, scalars, row).left
            to_student = soft * row.soft_weight - left * (scalars.kl_weight * scalars.student_rate / BITS)
            classes = torch.arange(student.shape[1], device=student.device, dtype=torch.int32)
            is_label = classes == label[:, :1].int()
            to_student = to_student + plain * row.plain_weight - torch.where(is_label, scalars.ce_weight, 0.0)
            to_student = first_order(to_student * upstream.unsqueeze(1), student)
        if upstream is not None and ctx.needs_input_grad[2]:
            to_guide = first_order(-scalars.kl_weight * removed * upstream, log_guide)
        return to_student, None, to_guide, *[None] * (len(ctx.needs_input_grad) - 3)


def _powers(shifted: Tensor, rate: Tensor, power: int | None) -> tuple[Tensor, Tensor]:
    """Return exp(shifted / tau_s) and exp(shifted)."""
    soft = (shifted * rate).exp2()
    return soft, (shifted * BITS).exp2() if power is None else soft**power


def _classes(
    student: Tensor,
    teacher: Tensor,
    log_guide: Tensor,
    mask: Tensor | None,
    zero_outside: bool,
    scalars: _Scalars,
    row: _Row,
) -> _Classes:
    log_g = (log_guide * BITS).unsqueeze(1)
    if mask is not None:
        log_g = torch.where(mask, log_g, -torch.inf)
    log_s = (student - row.student_peak) * scalars.student_rate - row.student_norm.log2()
    log_t = (teacher - row.teacher_peak) * scalars.teacher_rate - row.teacher_norm.log2()
    target = log_t.exp2()
    if zero_outside and mask is not None:
        target = target * mask
    above = log_g - log_s
    ratio = (-above.abs()).exp2()  # of the smaller of s and g to the larger
    to_larger = target / (1 + ratio)
    to_smaller, guide_is_larger = ratio * to_larger, above > 0
    return _Classes(
        target=target,
        log_ratio=log_t - (torch.maximum(log_s, log_g) + (1 + ratio).log2()),
        taken=torch.where(guide_is_larger, to_larger, to_smaller),
        left=torch.where(guide_is_larger, to_smaller, to_larger),
    )
