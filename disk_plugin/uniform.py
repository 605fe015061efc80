"""One g for all samples, without a network: the control beside every trained guide, and a guide by itself."""

from typing import Literal

import torch
from torch import Tensor

from . import _checks
from .level import OVER, SHARE, DiscountLevel


class UniformGuide(DiscountLevel):
    r"""A guide that gives every sample the same g: plugs into ``DiSKLoss(guide)``, has no parameters.

    The scaffold selects without being told to: by t s / (s + g) a class far below g is let go, the others keep their
    pull. What a trained guide adds to that is what it is ahead of this one. Not in the paper.

    One of three ways to say how large g is:

    - a number: constant. 0 is plain distillation.
    - two numbers: from the first to the second over the first ``over`` of training, straight.
    - ``discount``: the mean share of the teacher's pull that is taken off, which means the same for 10 and for 1,000
      classes, at any temperature, early and late: a target for :class:`disk_plugin.level.DiscountLevel`, or
      ``"auto"``. ``DiSKLoss(GuideHead(...))`` does the same with a guide that ranks.

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
        >>> disk = DiSKLoss(UniformGuide(discount=0.4))
        >>> student_logits, teacher_logits = 2 * torch.randn(2, 64, 10)
        >>> for _ in range(20):
        ...     terms = disk.terms(student_logits, teacher_logits, torch.arange(64) % 10)
        >>> round(terms.discount.item(), 3)
        0.4
    """

    def __init__(
        self,
        value: float | tuple[float, float] | None = None,
        *,
        discount: float | Literal["auto"] | None = None,
        share: float = SHARE,
        over: float = OVER,
    ) -> None:
        if (value is None) == (discount is None):
            raise ValueError(f"UniformGuide needs either value or discount, got value={value!r}, discount={discount!r}")
        ends = value if isinstance(value, tuple | list) else (value, value)
        if len(ends) != 2:
            raise ValueError(f"value must be a number or (first, last), got {value!r}")
        for end in ends if value is not None else ():
            _checks.number("value", end, at_least=0, at_most=1)
        super().__init__(discount, share=share, over=over)
        self.ends = None if value is None else (float(ends[0]), float(ends[1]))  # type: ignore[arg-type]

    def forward(self, teacher_logits: Tensor, teacher_features: Tensor | None = None) -> Tensor:
        """Return log g / (1 - g), one value for all positions."""
        log_g = self._log_guide()
        # log (1 - g) of g = 1 is -inf, and the logit inf, as it should be
        logit = log_g - torch.log(-torch.expm1(log_g))
        shape = (teacher_logits.shape[0], *teacher_logits.shape[2:])
        dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
        return logit.to(dtype).expand(shape)

    @property
    def follows_progress(self) -> bool:
        """Whether :meth:`set_progress` changes anything."""
        return super().follows_progress or (self.ends is not None and self.ends[0] != self.ends[1])

    def extra_repr(self) -> str:
        """Show the settings in ``print(guide)``."""
        return f"value={self.ends}, over={self.over}" if self.ends else super().extra_repr()

    def _log_guide(self) -> Tensor:
        if self.ends is None:
            return self.log_guide
        first, last = self.ends
        return (first + (last - first) * self._ramp()).log()
