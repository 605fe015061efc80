"""ScaleKD's losses of logits, from the authors' code: the cross-entropy with the teacher's probabilities."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ... import _checks
from ...functional._positions import promote, without_ignored


def logit_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    r"""Return ScaleKD's losses of logits per sample, multiplied by their weights.

    $$w_{CE}\,CE(y, p^S) \qquad w_{KD}\,\tau^2 \Big({-}\sum_k p^T_k \log p^S_k\Big)$$

    The second is a cross-entropy: the teacher's entropy is not subtracted, so it does not reach 0, and its gradient is
    that of Hinton's KL. The authors' weights are 1 - a and a, with a = 0.5. Half precision is upcast to float32, and
    all is computed in log space.

    Args:
        student_logits: before softmax.
        teacher_logits: before softmax.
        target: class indices, or probabilities of the logits' shape.
        ce_weight: weight of the first, >= 0.
        kd_weight: weight of the second, >= 0.
        temperature: divides both logits of the second, dimensionless, > 0.

    Shape:
        logits (N, C) or (N, C, d1, ...), C >= 2; target (N, d1, ...) or the logits'. Returns ``ce`` and ``kd``,
        (N, d1, ...), 0 for class indices outside 0 to C - 1.

    Raises:
        ValueError: values out of range, shapes that do not fit.
        TypeError: values of another type.
    """
    for name, value in {"ce_weight": ce_weight, "kd_weight": kd_weight}.items():
        _checks.number(name, value, at_least=0)
    _checks.number("temperature", temperature, above=0)
    _checks.logits(student_logits, teacher_logits)
    _checks.target(target, student_logits)
    s, t = promote(student_logits, teacher_logits.detach())
    counts = None
    if target.is_floating_point():
        ce = F.cross_entropy(s, target.to(s.dtype), reduction="none")
    else:
        counts = (target >= 0) & (target < s.shape[1])
        s, t = without_ignored(s, counts), without_ignored(t, counts)
        ce = F.cross_entropy(s, torch.where(counts, target, 0), reduction="none")
    kd = -((t / temperature).softmax(1) * (s / temperature).log_softmax(1)).sum(1)
    losses = {"ce": ce_weight * ce, "kd": kd_weight * temperature**2 * kd}
    return losses if counts is None else {name: torch.where(counts, each, 0.0) for name, each in losses.items()}
