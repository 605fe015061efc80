"""The level of g: one number, updated after each training batch until the mean discount meets its target."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _checks
from ._state import moving, write

SHARE, OVER = 0.8, 0.2  # of the "auto" target; chosen by examples/gain.py, see docs/evidence/default.md
MOST = 0.5  # upper bound of the "auto" target: above it the student has hardly begun to follow the teacher
_SMALLEST, _LONGEST_STEP = -16.0, 0.5  # of log g; a Newton step from far away overshoots
_NONE_YET = -1.0  # agreement before the first batch
# with a number > 0 as target; 0 is g = 0, and "auto" starts near 0: training begins as plain distillation
_FIRST = math.log(0.01)
_INITIAL = {
    "log_guide": _FIRST,
    "agreement": _NONE_YET,
    "last_agreement": _NONE_YET,
    "progress": 0.0,
    "gate": 1.0,
}
PATIENCE = 6.0  # the target stays 0 while an epoch removes a sixth of the disagreement
_MOMENTUM = 0.3  # of the running agreement; a smaller one lags behind a student trained from scratch
_FLAT = 1e-4  # smaller slopes are not informative: the step has its maximal length
_RANGE = 0.5  # the guide multiplies the odds of g by e^-.5 to e^.5; a wider range drops whole samples
_HIGHEST = -1e-3  # of log g; above it the ranking would be lost


class DiscountLevel(nn.Module):
    r"""One number, log g, set so that the mean discount d, the share of the teacher's pull taken off, meets a target.

    Not in the paper. With ``top_k`` it is the share of the pull on the K classes that receive g, as no more can be
    taken off. After each training batch it makes one Newton step towards the target d*:

    $$\Delta \log g = (d^* - d) \Big/ \tfrac1N \sum_i \sum_y \frac{t_y s_y g}{(s_y + g)^2}, \qquad
    |\Delta \log g| \le 1/2$$

    - A number is the target itself. 0 is plain distillation, g = 0.
    - ``"auto"`` follows the student: d* = ``share * (1 - agreement)``, at most 1/2. ``agreement`` is the running share
      of training samples on which the student's argmax is the teacher's. The target is ramped up from 0 over the first
      ``over`` of training. It is held back while an epoch still removes a sixth or more of the disagreement: it is
      multiplied by ``1 - 6 * (agreement - last) / (1 - last)``, at least 0, with ``last`` the agreement an epoch ago.
      As ``agreement`` is that of about six batches, the target is noisy if these hold fewer than some 100 samples each.

    Args:
        discount: target in [0, .99], or ``"auto"``.
        share: factor of the ``"auto"`` target, in (0, 1].
        over: share of training over which the ``"auto"`` target is ramped, in (0, 1].

    Raises:
        ValueError: values out of range.
        TypeError: values of another type.
    """

    log_guide: Tensor
    agreement: Tensor
    last_agreement: Tensor  # at the end of the previous epoch
    progress: Tensor
    gate: Tensor
    rewound_from: float = 0.0  # progress that was loaded after a scheduler was made, or that one has set back

    def __init__(self, discount: float | Literal["auto"] | None, *, share: float = SHARE, over: float = OVER) -> None:
        super().__init__()
        if isinstance(discount, str):
            _checks.choice("discount", discount, ("auto",))
        elif discount is not None:
            _checks.number("discount", discount, at_least=0, at_most=0.99)
            discount = float(discount)
        _checks.number("share", share, above=0, at_most=1)
        _checks.number("over", over, above=0, at_most=1)
        self.discount, self.share, self.over = discount, float(share), float(over)
        self.patience = PATIENCE
        self.has_scheduler, self.batches_without_progress = False, 0  # training batches since ``set_progress``
        self.warned_unstepped = False
        self._initial = dict(_INITIAL)
        self._lowest = -math.inf if discount == 0 else _SMALLEST
        if discount in ("auto", 0):
            self._initial["log_guide"] = self._lowest
        for name, number in self._initial.items():
            self.register_buffer(name, torch.tensor(number, dtype=torch.float64))

    @torch.no_grad()
    def set_progress(self, progress: float, *, ends_epoch: bool = True) -> None:
        """Set the training progress, from 0 to 1 (more counts as 1), once per epoch; ``DualScheduler`` calls it.

        ``ends_epoch`` is False where a run begins or is resumed: what was loaded, before or after, stays.
        """
        _checks.number("progress", progress, at_least=0)
        self.has_scheduler, self.batches_without_progress = True, 0
        progress, last = min(progress, 1.0), self.last_agreement
        if not ends_epoch:
            rewound = not self.progress.is_meta and self.progress.item() > progress
            self.rewound_from = self.progress.item() if rewound else 0.0
            self.progress.fill_(progress)
            return
        new = (self.progress != progress) & (self.agreement != last)  # else the same call again
        self.rewound_from = 0.0
        gain = (self.agreement - last) / (1 - last).clamp(min=_FLAT)
        self.gate.copy_(torch.where(new, (1 - self.patience * gain).clamp(0.0, 1.0), self.gate))
        self.last_agreement.copy_(torch.where(new, self.agreement, last))
        self.progress.fill_(progress)

    @torch.no_grad()
    def step(self, discount: Tensor, slope: Tensor, agreement: Tensor, mean_logit: Tensor) -> None:
        """Update g in place after a training batch; ``DiSKLoss`` calls it. A batch that is not finite is skipped.

        Args:
            discount: mean share of the teacher's pull, on the classes that receive g, that was taken off, a scalar.
            slope: its derivative w.r.t. log g, a scalar.
            agreement: share of samples on which the student's argmax is the teacher's, a scalar.
            mean_logit: mean of the guide's own logits, a scalar; used by ``GuideLevel`` only.

        Raises:
            RuntimeError: under a ``torch.func`` transform without the buffers.
        """
        discount, slope, agreement = (value.to(self.log_guide.dtype) for value in (discount, slope, agreement))
        finite = (discount + slope + agreement).isfinite()
        first = self.agreement < 0
        last = torch.where(self.last_agreement < 0, agreement, self.last_agreement)
        moved = self._moved(mean_logit, first)
        agreement = torch.where(first, agreement, torch.lerp(self.agreement, agreement, _MOMENTUM))
        missing = self._target(agreement) - discount
        slope = torch.where(slope > 0, slope, discount * (1 - discount))  # its upper bound, if no sample gives a slope
        step = (missing / slope.clamp(min=_FLAT)).clamp(-_LONGEST_STEP, _LONGEST_STEP)
        log_guide = (self.log_guide + step).clamp(self._lowest, 0.0)
        self._write(finite, log_guide=log_guide, agreement=agreement, last_agreement=last, **moved)

    def _moved(self, mean_logit: Tensor, first: Tensor) -> dict[str, Tensor]:
        """Return further buffers to update, by name; ``first``: the first batch."""
        return {}

    @property
    def follows_progress(self) -> bool:
        """Whether the target depends on the training progress."""
        return self.discount == "auto"

    @property
    def target(self) -> Tensor:
        """The current target of the mean discount, a scalar."""
        return self._target(self.agreement.clamp(min=0.0))

    def _write(self, finite: Tensor, **moved: Tensor) -> None:
        for name, value in moved.items():
            buffer = getattr(self, name)
            if not write(buffer, torch.where(finite, value, buffer)):
                raise RuntimeError(
                    "a target of the discount updates a buffer in training mode, which this transform of torch.func "
                    "does not allow: call disk.eval(), which uses g as it is, or pass the buffers to "
                    "torch.func.functional_call"
                )

    def _ramp(self) -> Tensor:
        return (self.progress / self.over).clamp(max=1.0)

    def _target(self, agreement: Tensor) -> Tensor:
        """Return the current target of the mean discount."""
        if isinstance(self.discount, float):
            return torch.full_like(agreement, self.discount)
        return (self.share * (1 - agreement)).clamp(max=MOST) * self._ramp() * self.gate

    def _apply(self, fn: Any, recurse: bool = True) -> "DiscountLevel":
        """Move the module; its scalars stay float64, and are reinitialized on leaving meta."""
        with moving(self, fn, self._initial):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load; with a discount of 0 g stays 0, whatever target the checkpoint had."""
        super()._load_from_state_dict(*args)
        self.rewound_from = 0.0 if self.progress.is_meta or not self.has_scheduler else self.progress.item()
        if self.discount == 0:
            with torch.no_grad():
                self.log_guide.fill_(-math.inf)

    def extra_repr(self) -> str:
        """Show the settings and the current target in ``print(loss)``."""
        automatic = f", share={self.share}, over={self.over}" if self.discount == "auto" else ""
        return f"discount={self.discount!r}{automatic}, target={to_shown(self.target)}"


def to_shown(value: Tensor) -> Any:
    """Return a scalar buffer as a number of four digits, or, if it has no value to read (meta), the tensor itself."""
    return value if value.is_meta else float(f"{value.item():.4g}")


class GuideLevel(DiscountLevel):
    """The level for a guide that ranks samples: the guide's logits, centred and bounded, are added to it."""

    centre: Tensor

    def __init__(self, discount: float | Literal["auto"]) -> None:
        super().__init__(discount)
        self._initial["centre"] = 0.0
        self.register_buffer("centre", torch.tensor(0.0, dtype=torch.float64))

    def place(self, guide_logits: Tensor) -> Tensor:
        """Return log(g / (1 - g)) for the guide's own logits, both (N,) or (N, d1, ...)."""
        _checks.tensor("guide_logits", guide_logits)
        guide_logits = guide_logits.to(torch.promote_types(guide_logits.dtype, torch.float32))
        log_g = self.log_guide.clamp(max=_HIGHEST)
        logit = (log_g - torch.log(-torch.expm1(log_g))).to(guide_logits.dtype)
        return logit + _RANGE * torch.tanh((guide_logits - self.centre.to(guide_logits.dtype)) / _RANGE)

    def _moved(self, mean_logit: Tensor, first: Tensor) -> dict[str, Tensor]:
        """Update the running mean of the guide's logits."""
        mean_logit = mean_logit.to(self.centre.dtype)
        centre = torch.where(first, mean_logit, torch.lerp(self.centre, mean_logit, _MOMENTUM))
        return {"centre": torch.where(mean_logit.isfinite(), centre, self.centre)}
