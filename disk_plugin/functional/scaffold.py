"""Equation (4): scaffolded knowledge distillation, and the discount that the scaffold implies."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks
from ._positions import REDUCTIONS, Reduction, by_position, promote, to_dtype
from .blocks import Rows, rows

TeacherTarget = Literal["all", "scaffolded"]


def temperatures(temperature: float, student_temperature: float | Tensor | None) -> float | Tensor:
    """Validate both temperatures and return the student's; None is the teacher's."""
    tau_s = temperature if student_temperature is None else student_temperature
    _checks.number("temperature", temperature, above=0)
    _checks.number("student_temperature", tau_s, above=0)
    return tau_s


def scaffold_mask(teacher_logits: Tensor, top_k: int | None = None, label: Tensor | None = None) -> Tensor:
    """Mark the classes that receive g: exactly the teacher's top-K, and the label if given.

    Ties go to the lowest class index, on every device.

    Args:
        teacher_logits: (N, C) or (N, C, d1, ...).
        top_k: number of classes; None or >= C for all.
        label: class indices (N, d1, ...) that are added to the top-K, as the authors' code does.

    Returns:
        Bool tensor of the shape of ``teacher_logits``.

    Raises:
        ValueError: shapes that do not fit, top_k < 1.
        TypeError: logits not floating-point, label not int64.
    """
    _check_mask(teacher_logits, top_k, label)
    mask, _ = mask_and_size(teacher_logits, top_k, label)
    return torch.ones_like(teacher_logits, dtype=torch.bool) if mask is None else mask


def _check_mask(teacher_logits: Tensor, top_k: int | None, label: Tensor | None) -> None:
    _checks.logits(teacher_logits, teacher_logits, student="teacher_logits")
    if label is not None:
        _checks.label(label, teacher_logits)
    if top_k is not None:
        _checks.integer("top_k", top_k, at_least=1)


def mask_and_size(
    teacher_logits: Tensor, top_k: int | None, label: Tensor | None
) -> tuple[Tensor | None, int | Tensor]:
    """Return the mask, None for all classes, and the number of its classes, per position if the label may add one."""
    if top_k is None or top_k >= teacher_logits.shape[1]:
        return None, teacher_logits.shape[1]
    threshold = teacher_logits.topk(top_k, dim=1).values[:, -1:]  # the K-th largest logit
    above, tied = teacher_logits > threshold, teacher_logits == threshold
    places_left = top_k - above.sum(1, keepdim=True)
    mask = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= places_left))
    if label is None:
        return mask, top_k
    index = label.unsqueeze(1)
    return mask.scatter(1, index, True), top_k + ~mask.gather(1, index).squeeze(1)


def scaffold(
    student_logits: Tensor,
    teacher_logits: Tensor,
    guide_logits: Tensor,
    label: Tensor,
    mask: Tensor | None,
    valid: Tensor | None = None,
    *,
    temperature: float,
    student_temperature: float | Tensor,
    ce_weight: float = 0.0,
    distill_weight: float = 1.0,
    teacher_target: TeacherTarget = "all",
) -> Rows:
    """Evaluate ce_weight CE + distill_weight (4) per position, with labels (N, L, d1, ...): fields (N, d1, ...)."""
    found = rows(
        by_position(student_logits),
        by_position(teacher_logits),
        logsigmoid(guide_logits).flatten(),
        by_position(label),
        None if mask is None else by_position(mask),
        None if valid is None else valid.flatten(),
        ce_weight=ce_weight,
        kl_weight=distill_weight * temperature * student_temperature,
        temperature=temperature,
        student_temperature=student_temperature,
        zero_outside=teacher_target == "scaffolded",
    )
    shape = guide_logits.shape
    return Rows(*(value.reshape(*shape, *value.shape[1:]) for value in found))


def scaffolded_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    guide_logits: Tensor,
    *,
    temperature: float = 4.0,
    student_temperature: float | Tensor | None = None,
    top_k: int | None = None,
    label: Tensor | None = None,
    teacher_target: TeacherTarget = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return the distillation loss under the guide's scaffold, Kag et al. (ICLR 2023), eq. (4).

    $$\frac{\tau\tau_s}{N}\sum_i\sum_y t^\tau_y \log\frac{t^\tau_y}{s^{\tau_s}_y + 1[y \in K]\, g}$$

    It may be negative, as s + g sums to more than 1. The defaults are the paper's; the authors' code adds the label to
    K (``label``) and zeroes the teacher's target outside K (``teacher_target="scaffolded"``).

    Args:
        student_logits: before softmax.
        teacher_logits: before softmax; no gradient reaches them.
        guide_logits: the guide before its sigmoid.
        temperature: divides the teacher's logits, dimensionless, > 0.
        student_temperature: divides the student's logits, > 0; None for ``temperature``.
        top_k: number of the teacher's largest classes that receive g; None for all.
        label: class indices that are added to the top-K.
        teacher_target: ``"all"``: softmax over all classes; ``"scaffolded"``: zero outside K, see ``Variant``.
        reduction: ``"mean"`` over samples (pixels), ``"sum"`` or ``"none"``.

    Shape:
        logits (N, C) or (N, C, d1, ...); guide_logits and label (N,) or (N, d1, ...); returns a scalar or (N, d1, ...).

    Raises:
        ValueError: shapes that do not fit, temperatures <= 0, top_k < 1.
        TypeError: tensors that are not floating-point.
    """
    _checks.choice("reduction", reduction, REDUCTIONS)
    tau_s = temperatures(temperature, student_temperature)
    parts = _parts(student_logits, teacher_logits, guide_logits, temperature, tau_s, top_k, label, teacher_target)
    loss = parts.objective
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()


def discount(
    student_logits: Tensor,
    teacher_logits: Tensor,
    guide_logits: Tensor,
    *,
    temperature: float = 4.0,
    student_temperature: float | Tensor | None = None,
    top_k: int | None = None,
    label: Tensor | None = None,
    teacher_target: TeacherTarget = "all",
) -> Tensor:
    r"""Return the discount, the share of the teacher's pull that the scaffold takes off, per sample, in [0, 1].

    $$d = 1 - \sum_y w_y / \sum_y t_y, \qquad w_y = t_y s_y / (s_y + 1[y \in K]\, g)$$

    The student's gradient under (4) is that of the target w instead of t: at 0 plain distillation, at 1 the sample is
    dropped. Where s is far below g even a small g takes off nearly everything, so read it together with g. Not in
    the paper.

    Args and Shape are those of ``scaffolded_kl``; returns (N, d1, ...), detached.

    Raises:
        ValueError: shapes that do not fit, temperatures <= 0, top_k < 1.
        TypeError: tensors that are not floating-point.
    """
    tau_s = temperatures(temperature, student_temperature)
    with torch.no_grad():
        return get_discount(
            _parts(student_logits, teacher_logits, guide_logits, temperature, tau_s, top_k, label, teacher_target)
        )


def _parts(
    student_logits: Tensor,
    teacher_logits: Tensor,
    guide_logits: Tensor,
    temperature: float,
    student_temperature: float | Tensor,
    top_k: int | None,
    label: Tensor | None,
    teacher_target: TeacherTarget,
) -> Rows:
    """Validate, promote, mask and evaluate, for the public functions of (4)."""
    _checks.logits(student_logits, teacher_logits)
    _checks.per_position("guide_logits", guide_logits, student_logits)
    _checks.choice("teacher_target", teacher_target, ("all", "scaffolded"))
    _check_mask(teacher_logits, top_k, label)
    s, t, g = promote(student_logits, teacher_logits.detach(), guide_logits)
    return scaffold(
        s,
        t,
        g,
        t.argmax(1, keepdim=True),
        mask_and_size(t, top_k, label)[0],
        temperature=temperature,
        student_temperature=to_dtype(student_temperature, s.dtype),
        teacher_target=teacher_target,
    )


def get_discount(parts: Rows) -> Tensor:
    """Divide the removed mass by the target's; 0 for a target that underflowed to 0."""
    return _divide_by_mass(parts.removed, parts)


def get_discount_slope(parts: Rows) -> Tensor:
    """Return d discount / d log g."""
    return _divide_by_mass(parts.slope, parts)


def get_reach(parts: Rows) -> Tensor:
    """Return the largest possible discount, the share of the target on the classes that receive g."""
    return _divide_by_mass(parts.reach, parts)


def _divide_by_mass(part: Tensor, parts: Rows) -> Tensor:
    return part / parts.target_mass.clamp(min=torch.finfo(part.dtype).tiny)


def get_divergence(parts: Rows, guide: Tensor, size: int | Tensor) -> Tensor:
    r"""Return the Kullback-Leibler divergence of the target from the scaffolded student, nats, at least 0.

    s + g on the ``size`` scaffolded classes sums to Z = 1 + size g, so (s + 1[y in K] g) / Z is a distribution. The
    divergence of t from it is (4) plus log Z, a constant for the student. For a target of mass m < 1 (the authors' code
    zeroes some classes) it is m KL(t / m || .), that is (4) plus m log(Z / m).
    """
    mass = parts.target_mass.clamp(min=torch.finfo(guide.dtype).tiny)
    return (parts.kl + mass * (torch.log1p(size * guide) - mass.log())).clamp(min=0)  # less is rounding
