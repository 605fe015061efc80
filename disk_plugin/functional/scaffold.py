"""Equation (4): scaffolded knowledge distillation, and the discount that the scaffold amounts to."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from .. import _checks
from ._positions import Reduction, as_dtype, promote

TeacherTarget = Literal["all", "scaffolded"]


class Scaffold(NamedTuple):
    """Per-position parts of the scaffolded divergence, (N, d1, ...) each."""

    kl: Tensor  # sum_y t_y log(t_y / (s_y + g)), without the factor tau tau_s
    removed: (
        Tensor  # sum_k t_k g / (s_k + g) over the scaffolded classes: the share of t taken off, and -d kl / d log g
    )
    target_mass: Tensor  # sum_y t_y


def temperatures(temperature: float, student_temperature: float | Tensor | None) -> float | Tensor:
    """Check both temperatures and return the student's, which is the teacher's where None."""
    tau_s = temperature if student_temperature is None else student_temperature
    _checks.number("temperature", temperature, above=0)
    _checks.number("student_temperature", tau_s, above=0)
    return tau_s


def scaffold_mask(teacher_logits: Tensor, top_k: int | None = None, label: Tensor | None = None) -> Tensor:
    """Mark the classes that receive the guide: the teacher's top-K, and the label if given.

    Exactly ``top_k`` classes are taken; among equal logits the lowest class index goes first, on every device.

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
    _checks.logits(teacher_logits, teacher_logits, student="teacher_logits")
    if label is not None:
        _checks.label(label, teacher_logits)
    if top_k is not None:
        _checks.integer("top_k", top_k, at_least=1)
    if top_k is None or top_k >= teacher_logits.shape[1]:
        return torch.ones_like(teacher_logits, dtype=torch.bool)
    threshold = teacher_logits.topk(top_k, dim=1).values[:, -1:]  # the K-th largest logit
    above, tied = teacher_logits > threshold, teacher_logits == threshold
    places_left = top_k - above.sum(1, keepdim=True)
    mask = above | (tied & (tied.cumsum(1) <= places_left))
    return mask if label is None else mask.scatter(1, label.unsqueeze(1), True)


def scaffold(
    student_logits: Tensor,
    teacher_logits: Tensor,
    guide_logits: Tensor,
    mask: Tensor,
    *,
    temperature: float | Tensor,
    student_temperature: float | Tensor,
    teacher_target: TeacherTarget = "all",
) -> Scaffold:
    """Evaluate (4) per position in log space; gradients flow to the student and the guide through ``kl`` alone."""
    t, log_t = softened_target(teacher_logits, mask, temperature, teacher_target)
    log_s = log_softmax(student_logits / student_temperature, 1)
    scaffolded, removed = with_guide(log_s, t, guide_logits, mask)
    return Scaffold((t * (log_t - scaffolded)).sum(1), removed, t.sum(1))


def softened_target(
    teacher_logits: Tensor, mask: Tensor, temperature: float | Tensor, teacher_target: TeacherTarget
) -> tuple[Tensor, Tensor]:
    """Return the teacher's probabilities t and log t; t is 0 outside the mask where only "scaffolded" ones count."""
    softened = teacher_logits / temperature
    if teacher_target == "scaffolded":
        softened = torch.where(mask, softened, teacher_logits.amin(1, keepdim=True))
    log_t = log_softmax(softened, 1)
    # a product, not torch.where: an infinite teacher logit must end as NaN, not as a zero
    return log_t.exp() * mask if teacher_target == "scaffolded" else log_t.exp(), log_t


def with_guide(log_s: Tensor, t: Tensor, guide_logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return log(s_y + 1[y in K] g), and the sum over K of t_k g / (s_k + g); without a mask all classes are in K."""
    log_g = logsigmoid(guide_logits).unsqueeze(1)  # g is never formed: log g stays finite where g underflows
    scaffolded = torch.logaddexp(log_s, log_g)
    if mask is not None:
        scaffolded = torch.where(mask, scaffolded, log_s)
    with torch.no_grad():
        t = t if mask is None else t * mask
        # g / (s + g) <= 1 on the scaffold; off it, where it could overflow, it is not used
        removed = (t * (log_g - scaffolded).clamp(max=0).exp()).sum(1)
    return scaffolded, removed


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

    .. math:: \frac{\tau\tau_s}{N}\sum_i\sum_y t^\tau_y \log\frac{t^\tau_y}{s^{\tau_s}_y + 1[y \in K]\, g}

    It may be negative, as s + g sums to more than 1. The authors' code adds the label to K and zeroes the teacher's
    target outside it (``label``, ``teacher_target="scaffolded"``); the defaults are the paper's.

    Args:
        student_logits: before softmax.
        teacher_logits: before softmax; no gradient reaches them.
        guide_logits: the guide before its sigmoid.
        temperature: divides the teacher's logits, dimensionless, > 0.
        student_temperature: divides the student's logits, > 0; None for ``temperature``.
        top_k: number of the teacher's largest classes that receive g; None for all.
        label: class indices added to the top-K.
        teacher_target: ``"all"`` classes, or zeroed outside the ``"scaffolded"`` ones.
        reduction: ``"mean"`` over positions, or ``"none"``.

    Shape:
        logits (N, C) or (N, C, d1, ...); guide_logits and label (N,) or (N, d1, ...); returns a scalar or (N, d1, ...).

    Raises:
        ValueError: shapes that do not fit, temperatures <= 0, top_k < 1.
        TypeError: tensors that are not floating-point.
    """
    _checks.choice("reduction", reduction, ("mean", "none"))
    tau_s = temperatures(temperature, student_temperature)
    parts = _parts(student_logits, teacher_logits, guide_logits, temperature, tau_s, top_k, label, teacher_target)
    loss = temperature * as_dtype(tau_s, parts.kl.dtype) * parts.kl
    return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss


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
    r"""Return the share of the teacher's pull on the student that the scaffold takes off, per position, in [0, 1].

    .. math:: d = 1 - \sum_y w_y / \sum_y t_y, \qquad w_y = t_y s_y / (s_y + 1[y \in K]\, g)

    The student's gradient under (4) is that of a target w instead of t. 0: plain distillation. 1: the sample is left
    out. Where s is far below g, a small g takes off nearly everything, so read this beside g. Not in the paper.

    Args and Shape are those of :func:`scaffolded_kl`; the result (N, d1, ...) carries no gradient.

    Raises:
        ValueError: shapes that do not fit, temperatures <= 0, top_k < 1.
        TypeError: tensors that are not floating-point.
    """
    tau_s = temperatures(temperature, student_temperature)
    with torch.no_grad():
        return discount_of(
            _parts(student_logits, teacher_logits, guide_logits, temperature, tau_s, top_k, label, teacher_target)
        )


def _parts(
    student_logits: Tensor,
    teacher_logits: Tensor,
    guide_logits: Tensor,
    temperature: float | Tensor,
    student_temperature: float | Tensor,
    top_k: int | None,
    label: Tensor | None,
    teacher_target: TeacherTarget,
) -> Scaffold:
    """Check, promote, mask and evaluate: what the public functions of (4) share."""
    _checks.logits(student_logits, teacher_logits)
    _checks.per_position("guide_logits", guide_logits, student_logits)
    _checks.choice("teacher_target", teacher_target, ("all", "scaffolded"))
    s, t, g = promote(student_logits, teacher_logits.detach(), guide_logits)
    return scaffold(
        s,
        t,
        g,
        scaffold_mask(t, top_k, label),
        temperature=temperature,
        student_temperature=student_temperature,
        teacher_target=teacher_target,
    )


def discount_of(parts: Scaffold) -> Tensor:
    """Divide what is removed by the target's mass; a target that underflowed to nothing has nothing to take off."""
    return parts.removed / parts.target_mass.clamp(min=torch.finfo(parts.removed.dtype).tiny)
