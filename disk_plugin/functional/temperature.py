"""The student temperature of eq. (4): argmin over tau_s of sum_i KL(t^tau || s^tau_s), with beta = 1 / tau_s.

The objective is convex in beta. Its slope is the mean of E_s[l_S] - E_t[l_S] and its curvature the mean variance of
the student's logits l_S under s.
An untrained or anti-correlated student has its minimum at beta <= 0, so beta is clamped to [1 / (4 tau), 4 / tau].
"""

import torch
from torch import Tensor
from torch.nn.functional import softmax

from .. import _checks
from ._positions import promote

SPAN = 4.0  # tau_s is clamped to [tau / SPAN, tau * SPAN]
_MAX_STEPS = 60


def _slopes_and_curvatures(student_logits: Tensor, teacher_mean: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return d/d beta and d2/d beta2 of each position's divergence; ``teacher_mean`` is E_t[l_S] per position."""
    s = softmax(student_logits * beta.to(student_logits.dtype), 1)
    mean = (s * student_logits).sum(1, keepdim=True)
    variance = (s * (student_logits - mean).square()).sum(1)
    return mean.squeeze(1) - teacher_mean, variance


def _slope_and_curvature(student_logits: Tensor, teacher_mean: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and second derivative of the mean divergence w.r.t. beta."""
    slopes, curvatures = _slopes_and_curvatures(student_logits, teacher_mean, beta)
    return slopes.mean(), curvatures.mean()


def _inputs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the student's logits, centred per position to avoid cancellation, and their mean under the teacher."""
    s, t = promote(student_logits.detach(), teacher_logits.detach())
    s = s - s.mean(1, keepdim=True)
    return s, (softmax(t / temperature, 1) * s).sum(1)


@torch.no_grad()
def fit_student_temperature(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""Return the student temperature of Kag et al. (ICLR 2023), section 3.2, from stored logits, by Newton's method.

    $$\tau_s = \arg\min_s \sum_i KL(t^\tau(x_i) \| s^s(x_i)), \qquad \tau/4 \le \tau_s \le 4\tau$$

    Newton steps in 1 / tau_s inside a bracket that shrinks at every step. NaN in the logits propagates.

    Args:
        student_logits: before softmax, of the training set.
        teacher_logits: before softmax, of the same samples.
        temperature: divides the teacher's logits, dimensionless, > 0.

    Shape:
        logits (N, C) or (N, C, d1, ...); returns a scalar tensor.

    Raises:
        ValueError: shapes that do not fit, temperature <= 0.
        TypeError: logits that are not floating-point.

    Examples:
        >>> import torch
        >>> teacher_logits = torch.randn(64, 10)
        >>> tau_s = fit_student_temperature(2 * teacher_logits, teacher_logits, temperature=4.0)
        >>> round(tau_s.item(), 3)  # twice the logits need twice the temperature
        8.0
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.number("temperature", temperature, above=0)
    s, teacher_mean = _inputs(student_logits, teacher_logits, temperature)
    low, high = s.new_tensor(1 / (SPAN * temperature)), s.new_tensor(SPAN / temperature)
    if (_slope_and_curvature(s, teacher_mean, low)[0] >= 0).item():
        return 1 / low if not _is_flat(s) else s.new_tensor(temperature)
    if (_slope_and_curvature(s, teacher_mean, high)[0] <= 0).item():
        return 1 / high
    beta = s.new_tensor(1 / temperature)
    for _ in range(_MAX_STEPS):
        slope, curvature = _slope_and_curvature(s, teacher_mean, beta)
        low, high = torch.where(slope < 0, beta, low), torch.where(slope > 0, beta, high)
        newton, middle = beta - slope / curvature, (low * high).sqrt()
        step = torch.where((newton > low) & (newton < high), newton, middle)
        if ((step - beta).abs() <= 4 * torch.finfo(s.dtype).eps * beta).item():
            break
        beta = step
    return 1 / beta + 0 * slope  # NaN where the logits are


def _is_flat(student_logits: Tensor) -> bool:
    """Whether the student's logits are constant, so that every temperature is as good."""
    return bool((student_logits == 0).all())


@torch.no_grad()
def student_temperature_step(
    student_logits: Tensor,
    teacher_logits: Tensor,
    moments: Tensor,
    student_temperature: Tensor,
    *,
    temperature: float = 4.0,
    momentum: float = 0.1,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the student temperature after one Newton step on a batch, and the running moments it is based on.

    At beta = 1 / tau_s the batch's slope f' and curvature f'' give the line f'(x) = f' + f'' (x - beta). The running
    means of f'' and of f'' beta - f' describe the average line; the new beta is its root, within the clamp of
    ``fit_student_temperature``. The mean of the batches' own roots would be biased for small batches.

    Args:
        student_logits: before softmax, of one batch.
        teacher_logits: before softmax, of the same batch.
        moments: (2,) running means of f'' and f'' beta - f'; zeros at the start.
        student_temperature: the current one, a scalar tensor; start at ``temperature``.
        temperature: divides the teacher's logits, dimensionless, > 0.
        momentum: weight of the new batch in the running means, in (0, 1].
        valid: bool, (N,) or (N, d1, ...), False for what is ignored; None for all True.

    Returns:
        The new student temperature and the new moments, as new detached tensors, unchanged in value if the batch is
        not finite or all of it is ignored.

    Raises:
        ValueError: shapes that do not fit, temperature <= 0, momentum outside (0, 1].
        TypeError: logits that are not floating-point.
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.number("temperature", temperature, above=0)
    _checks.number("momentum", momentum, above=0, at_most=1)
    s, teacher_mean = _inputs(student_logits, teacher_logits, temperature)
    beta = 1 / student_temperature
    slopes, curvatures = _slopes_and_curvatures(s, teacher_mean, beta)
    if valid is None:
        valid = torch.ones_like(slopes, dtype=torch.bool)
    count = valid.sum()  # 0 / 0 is NaN, which keeps the old moments below
    slope, curvature = (
        torch.where(valid, value, 0.0).to(moments.dtype).sum() / count for value in (slopes, curvatures)
    )
    updated = torch.lerp(moments, torch.stack([curvature, curvature * beta - slope]), momentum)
    root = torch.where(updated[0] > 0, updated[1] / updated[0], beta)  # a flat student has no preference
    new = 1 / root.clamp(1 / (SPAN * temperature), SPAN / temperature)
    # an overflowing batch (its loss is NaN, a GradScaler skips it) must not stay in the running means forever
    finite = updated.isfinite().all()
    return torch.where(finite, new, student_temperature), torch.where(finite, updated, moments)
