"""Cross-entropy and eq. (4), one block of rows of logits at a time, with closed-form gradients.

Autograd would save a dozen (N, C) tensors and make a separate pass over each in forward and backward. Here a block's
temporaries stay in the cache, where the gradient is computed from them; one (N, C) tensor is saved for backward, and
of half-precision logits their upcast copy too.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ._first_order import first_order
from ._positions import transformed, without_ignored
from .fused import BITS, fused_rows

# Elements of a block: on a CPU it fits into a core's cache, elsewhere it bounds the memory.
_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**24


class Rows(NamedTuple):
    """What (5) needs of (N, C) logits, per row. Only ``objective`` is differentiable, once."""

    objective: Tensor  # ce_weight ce_0 + kl_weight kl, (N,)
    ce: Tensor  # -log softmax(student)_label for each of the L labels, nats, (N, L)
    kl: Tensor  # sum_y t_y log(t_y / (s_y + 1[y in K] g)), (N,)
    removed: Tensor  # sum_k t_k g / (s_k + g) over K: the share of t taken off, and -d kl / d log g, (N,)
    slope: Tensor  # d removed / d log g = sum_k t_k s_k g / (s_k + g)^2 over K, (N,)
    target_mass: Tensor  # sum_y t_y, (N,)
    reach: Tensor  # sum_k t_k over K, the largest that ``removed`` can be, (N,)
    prediction: Tensor  # the student's argmax, (N,)


def rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    log_guide: Tensor,
    label: Tensor,
    mask: Tensor | None,
    valid: Tensor | None = None,
    *,
    ce_weight: float,
    kl_weight: float | Tensor,
    temperature: float,
    student_temperature: float | Tensor,
    zero_outside: bool = False,
) -> Rows:
    """Evaluate the fields of ``Rows``.

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C), of the same floating-point type; no gradient reaches them.
        log_guide: log g, (N,).
        label: int64 (N, L).
        mask: bool (N, C), the scaffolded classes; None for all.
        valid: bool (N,); other rows are read as zeros. None for all.
        ce_weight: weight of the cross-entropy to the first label.
        kl_weight: weight of the divergence.
        temperature: divides the teacher's logits.
        student_temperature: divides the student's logits.
        zero_outside: whether the teacher's target is zero outside ``mask``, as in the authors' code.
    """
    arguments = (
        student_logits,
        teacher_logits,
        log_guide,
        label,
        mask,
        valid,
        ce_weight,
        kl_weight,
        temperature,
        student_temperature,
        zero_outside,
    )
    if torch.compiler.is_compiling():
        return Rows(*fused_rows(*arguments))
    with_gradient = torch.is_grad_enabled() and (student_logits.requires_grad or transformed())
    *found, _ = _Rows.apply(*arguments, with_gradient)
    return Rows(*found)


def softened_teacher(
    teacher_logits: Tensor, mask: Tensor | None, temperature: float | Tensor, zero_outside: bool
) -> tuple[Tensor, Tensor]:
    """Return log t and the softened target t, (N, C); with ``zero_outside`` t is 0 outside the mask."""
    logits = teacher_logits / temperature
    if zero_outside and mask is not None:
        logits = torch.where(mask, logits, teacher_logits.amin(1, keepdim=True))
    log_t = F.log_softmax(logits, 1)
    target = _exp(log_t)
    # not torch.where: an infinite logit must propagate as NaN, not become 0
    return log_t, target * mask if zero_outside and mask is not None else target


def with_guide(log_student: Tensor, log_guide: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return log(s + g), g / (s + g) and s / (s + g), (N, C), with g = 0 outside the mask; ``log_guide`` is (N, 1)."""
    above = log_guide - log_student
    if mask is not None:  # above too: log s may be -inf there as well, and -inf + inf would be NaN
        above, log_guide = (torch.where(mask, value, -torch.inf) for value in (above, log_guide))
    share = above.sigmoid()
    kept = above.neg_().sigmoid_()  # not 1 - share, which cancels if g is far above s
    # log(s + g) = max(log s, log g) - log max(share, kept): log1p and logaddexp are many times slower
    return torch.maximum(log_student, log_guide).sub_(torch.maximum(share, kept).log_()), share, kept


class _Rows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        log_guide: Tensor,
        label: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, ...]:
        whole: tuple[Tensor, ...] = ()
        for part in _parts(student):
            held, kept = (None if each is None else each[part] for each in (mask, valid))
            found = _block(student[part], teacher[part], log_guide[part], label[part], held, kept, *settings)
            if len(found[0]) == len(student):
                return found
            # written in place, not concatenated: small results kept per block would fragment the heap
            whole = whole or tuple(each.new_empty(len(student), *each.shape[1:]) for each in found)
            for joined, each in zip(whole, found, strict=True):
                joined[part] = each
        return whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        kl_weight, removed, gradient = inputs[7], output[3], output[-1]
        ctx.save_for_backward(inputs[0], inputs[2], kl_weight * removed, gradient)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(transformed())  # vmap of torch 2.4 takes no None for a gradient

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        student, log_guide, pull, gradient = ctx.saved_tensors
        to_student = to_guide = None
        if upstream is not None and ctx.needs_input_grad[0]:
            to_student = first_order(gradient * upstream.unsqueeze(1), student)
        if upstream is not None and ctx.needs_input_grad[2]:
            to_guide = first_order(-pull * upstream, log_guide)
        return to_student, None, to_guide, *[None] * 9


def _block(
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
    with_gradient: bool,
) -> tuple[Tensor, ...]:
    """Return the fields of ``Rows`` and, with ``with_gradient``, d objective / d student logits, (n, C)."""
    student, teacher = without_ignored(student, valid), without_ignored(teacher, valid)
    log_t, target = softened_teacher(teacher, mask, temperature, zero_outside)
    log_s = F.log_softmax(student / student_temperature, 1)
    scaffolded, share, kept = with_guide(log_s, log_guide.unsqueeze(1), mask)
    kl = (log_t - scaffolded).mul_(target).sum(1)
    taken = share.mul_(target)
    removed, slope = taken.sum(1), (taken * kept).sum(1)
    largest, prediction = student.max(1, keepdim=True)
    probability = F.softmax(student, 1)
    # the largest probability is 1 / sum exp(s - max)
    ce = largest - student.gather(1, label) - probability.amax(1, keepdim=True).log()
    objective, mass = ce_weight * ce[:, 0] + kl_weight * kl, target.sum(1)
    reach = mass.clone() if mask is None or zero_outside else (target * mask).sum(1)
    gradient = student.new_empty(len(student), 0)
    if with_gradient:
        left = kept * target
        gradient = _exp(log_s) * left.sum(1, keepdim=True)
        gradient = gradient.sub_(left).mul_(kl_weight / student_temperature).add_(probability, alpha=ce_weight)
        gradient = gradient.scatter_add(1, label[:, :1], torch.full_like(ce[:, :1], -ce_weight))
    return objective, ce, kl, removed, slope, mass, reach, prediction.squeeze(1), gradient


def _exp(value: Tensor) -> Tensor:
    """Return exp(value) via exp2, which torch vectorizes itself on a CPU; exp may call a library."""
    return (value * BITS).exp2_()


def _parts(logits: Tensor) -> Iterator[slice]:
    """Yield the slices of rows, one per block."""
    count, classes = logits.shape
    size = max(_BLOCK.get(logits.device.type, _BLOCK_ELSEWHERE) // classes, 1)
    for start in range(0, max(count, 1), size):
        yield slice(start, start + size)
