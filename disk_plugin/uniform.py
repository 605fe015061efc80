"""One g for all samples, without a network: a guide of its own, and the baseline for any trained guide."""

from typing import Literal

import torch
from torch import Tensor

from . import _checks
from .level import OVER, SHARE, DiscountLevel


class UniformGuide(DiscountLevel):
    r"""A guide that gives every sample the same g: pass it to ``DiSKLoss``. It has no parameters.

    Even a constant g is selective: with the target t s / (s + g), classes with s far below g are dropped and the others
    keep their pull. It is the baseline for a trained guide. Not in the paper.

    g is set in one of three ways:

    - ``value``, a number: constant. 0 is plain distillation.
    - ``value``, two numbers: linear from the first to the second over the first ``over`` of training, moved by each
      step of the scheduler. In five epochs, with ``over`` .2, it is the first in one epoch, then the second.
    - ``discount``: a target for the mean share of the teacher's pull that is taken off, or ``"auto"``; see
      ``disk_plugin.level.DiscountLevel``. It is comparable across numbers of classes, temperatures and epochs.
      ``DiSKLoss(GuideHead(...))`` does the same with a guide that ranks the samples.

    ``DualScheduler(disk, epochs=...)`` sets the training progress; in a loop without one, call ``set_progress``.
    With several ranks (``attach``) and with ``AccumulatedBatch`` the means are over the full batch.

    Args:
        value: g in [0, 1], or (first, last); None where ``discount`` is given.
        discount: target in [0, .99], or ``"auto"``; None where ``value`` is given.
        share: factor of the ``"auto"`` target, in (0, 1].
        over: share of training over which two values, or the ``"auto"`` target, are ramped, in (0, 1].

    Shape:
        teacher_logits (N, C) or (N, C, d1, ...); teacher_features are not read; returns guide logits (N,) or
        (N, d1, ...).

    Raises:
        ValueError: values out of range; both or neither of ``value`` and ``discount``.
        TypeError: values of another type.
        RuntimeError: ``discount`` in training mode under a ``torch.func`` transform without the buffers.

    Examples:
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

    feature_dim = 0  # as of GuideHead: features are not read

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
        """Return log(g / (1 - g)), the same for all samples, (N,) or (N, d1, ...)."""
        log_g = self._log_guide()
        # at g = 1, log(1 - g) is -inf and the logit inf, as intended
        logit = log_g - torch.log(-torch.expm1(log_g))
        shape = (teacher_logits.shape[0], *teacher_logits.shape[2:])
        dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
        return logit.to(dtype).expand(shape)

    @property
    def follows_progress(self) -> bool:
        """Whether g depends on the training progress."""
        return super().follows_progress or (self.ends is not None and self.ends[0] != self.ends[1])

    def extra_repr(self) -> str:
        """Show the settings in ``print(guide)``."""
        return f"value={self.ends}, over={self.over}" if self.ends else super().extra_repr()

    def _log_guide(self) -> Tensor:
        if self.ends is None:
            return self.log_guide
        first, last = self.ends
        return (first + (last - first) * self._ramp()).log()
