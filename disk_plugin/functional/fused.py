"""The computation of ``blocks``, written for ``torch.compile``, which fuses loops over the classes.

Writing (N, C) tensors is what costs, so backward recomputes values per class from the logits; the compiler may do that,
or compute the gradient in the forward and save it. Exponentials are powers of 2, because on a CPU inductor materializes
results of ``exp`` and ``sigmoid`` that are used twice, but not those of ``exp2``. Constant scalars stay constant. The
compiler does not support double backward.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._positions import without_ignored

BITS = math.log2(math.e)  # of a nat
_LARGEST_POWER = 8  # three multiplications, three bits of rounding; an exponential costs little more


class _Scalars(NamedTuple):
    """0-dim tensors; the compiler folds those made from a number."""

    student_rate: Tensor  # bits per unit of the student's logits: 1 / (tau_s log 2)
    teacher_rate: Tensor
    ce_weight: Tensor
    kl_weight: Tensor


class _Norms(NamedTuple):
    """The softmax's normalizers, (N, 1): the largest logit and sum_y 2^((logit_y - largest) rate)."""

    student_peak: Tensor
    student: Tensor
    teacher_peak: Tensor
    teacher: Tensor


class _Classes(NamedTuple):
    """What the guide leaves of the target and what it takes off, (N, C)."""

    target: Tensor  # t
    log_ratio: Tensor  # log2 t / (s + g)
    taken: Tensor  # t g / (s + g)
    left: Tensor  # w = t s / (s + g); not t - taken, which cancels if g is far above s
    slope: Tensor  # t s g / (s + g)^2


_VALUES = 8  # of blocks.Rows, among the outputs of forward


def fused_rows(
    student: Tensor,
    teacher: Tensor,
    log_guide: Tensor,
    label: Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    ce_weight: float,
    kl_weight: float | Tensor,
    temperature: float,
    student_temperature: float | Tensor,
    zero_outside: bool,
) -> tuple[Tensor, ...]:
    """Return the fields of ``blocks.Rows``; the arguments are those of ``blocks.rows``."""
    student, teacher = without_ignored(student, valid), without_ignored(teacher, valid)
    if zero_outside and mask is not None:
        teacher = torch.where(mask, teacher, temperature * teacher.amin(1, keepdim=True))
    numbers = (BITS / student_temperature, BITS / temperature, ce_weight, kl_weight)
    scalars = (number if isinstance(number, Tensor) else student.new_full((), number) for number in numbers)
    power = None  # the plain softmax is a power of the softened one: multiplications instead of an exponential
    if not isinstance(student_temperature, Tensor):
        for whole in range(1, _LARGEST_POWER + 1):  # not "in": dynamo of torch 2.9 has no range with a changing number
            power = whole if student_temperature == whole else power
    differentiable = torch.is_grad_enabled() and (student.requires_grad or log_guide.requires_grad)
    # without gradients dynamo does not support a Function with setup_context
    call = _FusedRows.apply if differentiable else _FusedRows.forward
    found = call(student, teacher, log_guide, label, mask, zero_outside, power, *scalars)
    return found[:_VALUES]


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
        norms = _Norms(student_peak, student_norm, teacher_peak, teacher_norm)
        each = _classes(student, teacher, log_guide, mask, zero_outside, scalars, norms)
        kl = (each.target * each.log_ratio).sum(1) / BITS
        ce = plain_norm.log() - (student.gather(1, label) - student_peak)
        removed, left = each.taken.sum(1), each.left.sum(1, keepdim=True)
        objective = scalars.ce_weight * ce[:, 0] + scalars.kl_weight * kl
        mass = each.target.sum(1)
        reach = mass.clone() if mask is None or zero_outside else (each.target * mask).sum(1)
        values = objective, ce, kl, removed, each.slope.sum(1), mass, reach, student.argmax(1)
        soft_weight = scalars.kl_weight * scalars.student_rate / BITS * left / student_norm
        return *values, soft_weight, scalars.ce_weight / plain_norm, *norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, teacher, log_guide, label, mask, ctx.zero_outside, ctx.power, *numbers = inputs
        ctx.save_for_backward(student, teacher, log_guide, label, mask, output[3], *numbers, *output[_VALUES:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        student, teacher, log_guide, label, mask, removed, *saved = ctx.saved_tensors
        scalars, saved = _Scalars(*saved[: len(_Scalars._fields)]), saved[len(_Scalars._fields) :]
        soft_weight, plain_weight, norms = saved[0], saved[1], _Norms(*saved[2:])
        to_student = to_guide = None
        if upstream is not None and ctx.needs_input_grad[0]:
            soft, plain = _powers(student - norms.student_peak, scalars.student_rate, ctx.power)
            left = _classes(student, teacher, log_guide, mask, ctx.zero_outside, scalars, norms).left
            to_student = soft * soft_weight - left * (scalars.kl_weight * scalars.student_rate / BITS)
            classes = torch.arange(student.shape[1], device=student.device, dtype=torch.int32)
            is_label = classes == label[:, :1].int()
            to_student = to_student + plain * plain_weight - torch.where(is_label, scalars.ce_weight, 0.0)
            to_student = to_student * upstream.unsqueeze(1)
        if upstream is not None and ctx.needs_input_grad[2]:
            to_guide = -scalars.kl_weight * removed * upstream
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
    norms: _Norms,
) -> _Classes:
    log_g = (log_guide * BITS).unsqueeze(1)
    log_s = (student - norms.student_peak) * scalars.student_rate - norms.student.log2()
    log_t = (teacher - norms.teacher_peak) * scalars.teacher_rate - norms.teacher.log2()
    target = log_t.exp2()
    if zero_outside and mask is not None:
        target = target * mask
    above = log_g - log_s
    if mask is not None:  # above too: log s may be -inf there as well, and -inf + inf would be NaN
        above, log_g = (torch.where(mask, value, -torch.inf) for value in (above, log_g))
    ratio = (-above.abs()).exp2()  # of the smaller of s and g to the larger
    to_larger = target / (1 + ratio)
    to_smaller, guide_is_larger = ratio * to_larger, above > 0
    return _Classes(
        target=target,
        log_ratio=log_t - (torch.maximum(log_s, log_g) + (1 + ratio).log2()),
        taken=torch.where(guide_is_larger, to_larger, to_smaller),
        left=torch.where(guide_is_larger, to_smaller, to_larger),
        slope=to_smaller / (1 + ratio),
    )
