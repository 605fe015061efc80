"""One g for all samples, without a network: the control beside every trained guide, and a guide by itself."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _checks
from ._state import keeping_float64, write

_SMALLEST, _LONGEST_STEP = -16.0, 0.5  # of log g; a Newton step from far off overshoots
_INITIAL = {"log_guide": math.log(0.01), "agreement": -1.0, "progress": 0.0}  # agreement: of no batch yet
_MOMENTUM = 0.1  # of the running agreement
_FLAT = 1e-4  # slopes below it tell nothing: the step is as long as it may be


class UniformGuide(nn.Module):
    r"""A guide that gives every sample the same g: plugs into ``DiSKLoss(guide)``, has no parameters.

    The scaffold selects without being told to: by t s / (s + g) a class far below g is let go, the others keep their
    pull. What a trained guide adds to that is what it is ahead of this one. Not in the paper. With it ``multiplier``
    and ``budget`` steer nothing (pass ``multiplier=0`` for a loss without their constant).

    One of three ways to say how large g is:

    - a number: constant. 0 is plain distillation.
    - two numbers: from the first to the second over the first ``over`` of training, straight.
    - ``discount``: the mean share d of the teacher's pull that is taken off, which means the same for 10 and for 1,000
      classes, at any temperature, early and late: after each training batch log g makes one Newton step towards it,

      .. math:: \Delta \log g = (d^* - d) \Big/ \tfrac1N \sum_i \sum_y \frac{t_y s_y g}{(s_y + g)^2}, \qquad
                |\Delta \log g| \le 1/2

      A number is the target d* itself. ``"auto"`` is ``share * (1 - agreement)``, of the running share of training
      samples on which the student's argmax is not the teacher's, and rises from 0 over the first ``over`` of training:
      it takes off as much as the student fails to follow, once it has had time to try.

    ``DualScheduler(disk, epochs=...)`` tells it how far training has come; in a loop without one call
    :meth:`set_progress`. In several processes (``attach``) and under ``AccumulatedBatch`` the means are the whole
    batch's.

    Args:
        value: g in [0, 1], or (first, last); None where ``discount`` is given.
        discount: target in [0, 1), or ``"auto"``; None where ``value`` is given.
        share: factor of the automatic target, in (0, 1].
        over: share of training over which two values, or the automatic target, are ramped, in (0, 1].

    Shape:
        teacher_logits (N, C) or (N, C, d1, ...); teacher_features are not read; returns (N,) or (N, d1, ...).

    Raises:
        ValueError: values out of range; both or neither of ``value`` and ``discount``.
        TypeError: values of another type.
        RuntimeError: a discount is aimed at in training mode under a transform of ``torch.func`` without the buffers.

    Example:
        >>> import torch
        >>> from disk_plugin import DiSKLoss
        >>> from disk_plugin.uniform import UniformGuide
        >>> disk = DiSKLoss(UniformGuide(discount=0.4), multiplier=0.0)
        >>> student_logits, teacher_logits = 2 * torch.randn(2, 64, 10)
        >>> for _ in range(20):
        ...     terms = disk.terms(student_logits, teacher_logits, torch.arange(64) % 10)
        >>> round(terms.discount.item(), 3)
        0.4
    """

    log_guide: Tensor
    agreement: Tensor
    progress: Tensor

    def __init__(
        self,
        value: float | tuple[float, float] | None = None,
        *,
        discount: float | Literal["auto"] | None = None,
        share: float = 0.6,
        over: float = 0.3,
    ) -> None:
        super().__init__()
        if (value is None) == (discount is None):
            raise ValueError(f"UniformGuide needs either value or discount, got value={value!r}, discount={discount!r}")
        ends = value if isinstance(value, tuple | list) else (value, value)
        if len(ends) != 2:
            raise ValueError(f"value must be a number or (first, last), got {value!r}")
        for end in ends if value is not None else ():
            _checks.number("value", end, at_least=0, at_most=1)
        if isinstance(discount, str):
            _checks.choice("discount", discount, ("auto",))
        elif discount is not None:
            _checks.number("discount", discount, at_least=0, at_most=0.99)
        _checks.number("share", share, above=0, at_most=1)
        _checks.number("over", over, above=0, at_most=1)
        self.ends = None if value is None else (float(ends[0]), float(ends[1]))  # type: ignore[arg-type]
        self.discount, self.share, self.over = discount, share, over
        for name, number in _INITIAL.items():
            self.register_buffer(name, torch.tensor(number, dtype=torch.float64))

    def forward(self, teacher_logits: Tensor, teacher_features: Tensor | None = None) -> Tensor:
        """Return log g / (1 - g), one value for all positions."""
        log_g = self._log_guide()
        # log (1 - g) of g = 1 is -inf, and the logit inf, as it should be
        logit = log_g - torch.log(-torch.expm1(log_g))
        shape = (teacher_logits.shape[0], *teacher_logits.shape[2:])
        dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
        return logit.to(dtype).expand(shape)

    @property
    def follows_discount(self) -> bool:
        """Whether :meth:`step` wants to be called after each training batch."""
        return self.discount is not None

    @torch.no_grad()
    def set_progress(self, progress: float) -> None:
        """Say which share of training is done, in [0, 1]: ``DualScheduler`` does."""
        _checks.number("progress", progress, at_least=0)
        self.progress.fill_(min(progress, 1.0))

    @torch.no_grad()
    def step(self, discount: Tensor, slope: Tensor, agreement: Tensor) -> None:
        """Move g after a training batch, in place: ``DiSKLoss`` does. A batch that is not finite moves nothing.

        Args:
            discount: mean share of the teacher's pull that was taken off, a scalar.
            slope: its derivative by log g, a scalar.
            agreement: share of the batch on which the student's argmax is the teacher's, a scalar.
        """
        discount, slope, agreement = (value.to(self.log_guide.dtype) for value in (discount, slope, agreement))
        finite = (discount + slope + agreement).isfinite()
        agreement = torch.where(self.agreement < 0, agreement, torch.lerp(self.agreement, agreement, _MOMENTUM))
        missing = self._target(agreement) - discount
        slope = torch.where(slope > 0, slope, discount * (1 - discount))  # its upper bound, where no sample told it
        step = (missing / slope.clamp(min=_FLAT)).clamp(-_LONGEST_STEP, _LONGEST_STEP)
        log_guide = (self.log_guide + step).clamp(_SMALLEST, 0.0)
        pairs = ((self.log_guide, log_guide), (self.agreement, agreement))
        if not all(write(buffer, torch.where(finite, moved, buffer)) for buffer, moved in pairs):
            raise RuntimeError(
                "UniformGuide(discount=...) moves a buffer in training mode, which this transform of torch.func does "
                "not allow: call disk.eval(), which uses g as it is, or pass the buffers to torch.func.functional_call"
            )

    def extra_repr(self) -> str:
        """Show the settings in ``print(guide)``."""
        shown = f"value={self.ends}" if self.ends else f"discount={self.discount!r}"
        return f"{shown}, share={self.share}, over={self.over}"

    def _log_guide(self) -> Tensor:
        if self.ends is None:
            return self.log_guide
        first, last = self.ends
        return (first + (last - first) * (self.progress / self.over).clamp(max=1.0)).log()

    def _target(self, agreement: Tensor) -> Tensor | float:
        """The discount that is aimed at now."""
        if self.discount == "auto":
            return self.share * (1 - agreement) * (self.progress / self.over).clamp(max=1.0)
        return float(self.discount or 0.0)

    def _apply(self, fn: Any, recurse: bool = True) -> "UniformGuide":
        """Move the module as ``DiSKLoss`` does: its scalars stay float64, and start anew off the meta device."""
        was_meta = self.progress.is_meta
        with keeping_float64(self, fn):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.progress.is_meta:
            for name, number in _INITIAL.items():
                getattr(self, name).fill_(number)
        return self
