"""Schedules of the discount's target, or of budget and multiplier, and warnings about the guide."""

import math
import warnings
from typing import Any, Literal

import torch

from . import _checks, _watch
from ._form import asks_for_budget, level_of, multiplier_bounds, pair, switch_to_budget
from ._untrained import GuideMoves
from .estimate import estimate_budget
from .loss import DiSKLoss

__all__ = ["DualScheduler", "estimate_budget"]


class DualScheduler:
    r"""Schedule the bound of g in a ``DiSKLoss``, as ``LRScheduler`` does the learning rate: ``step()`` once per epoch.

    With a **discount** (the default) it tells the loss the training progress, on which the ``"auto"`` target and a
    ``UniformGuide``'s ramp depend. Only ``epochs`` has to be given.

    With the paper's **budget** the multiplier rises from the smaller to the larger bound within each period. This is
    line 8 of Algorithm 1, Kag et al. (ICLR 2023):

    $$\lambda(r) = \lambda_{min} + (\lambda_{max} - \lambda_{min})\,(1 - \cos(\pi\,(r \bmod A)/A))/2$$

    It is ``CosineAnnealingWarmRestarts`` with T_0 = A = ``period``, but rising. A restart that would leave less than a
    full period is skipped:

    | ``epochs`` | ``period`` (T_0) | restarts at epoch | last cosine |
    |---|---|---|---|
    | 8 | 4 | 4 | 4 epochs |
    | 10 | 4 | 4 | 6 epochs |
    | 200 | 50 | 50, 100, 150 | 50 epochs |

    Construction writes epoch 0's values, each ``step()`` the next epoch's. The last ``step()`` writes exactly
    ``multiplier[1]``, so the last epoch that is trained sees the cosine one epoch earlier.

    The loss's own ``budget`` is kept unless one is given here. A ``multiplier`` given to the loss stays constant unless
    ``multiplier``, ``period`` or another ``rule`` is given here. Any of these, ``budget`` or ``budget_period`` switches
    a loss with the default discount to a budget.

    ``step()`` warns, once each:

    - if at least half of the epoch's batches had a NaN or inf loss;
    - if gradients reached the guide but its parameters are in no optimizer, or ``disk(...)`` never reached the student;
    - if a loss with an ``"auto"`` target or a ramp was loaded from a checkpoint, and the scheduler was not;
    - if it is called more than ``epochs`` times (once per batch?);
    - with a budget, if the guide is dead: g > .99 on every sample; g < .01 on every sample with a mean discount of at
      most .01; or, with the multiplier in the upper half of its range, a standard deviation of g below .002 while all g
      exceed .9 or the mean discount exceeds .95;
    - with a discount, if g is 1 and its target still missed.

    Construction warns if ``epochs`` are too few: the multiplier hardly rises, the budget or the discount never moves.
    Under ``"adaptive"`` and ``"ascent"`` every rank needs the same statistics (``distributed.share_statistics``).

    Args:
        loss: the loss to schedule.
        epochs: how many times ``step()`` will be called: whole epochs, or outer iterations of Algorithm 1.
        multiplier: (smallest, largest) multiplier, 0 <= smallest <= largest; None for the one given to the loss, else
            the paper's (.1, 50).
        period: epochs from one restart to the next, >= 1; None for ceil(epochs / 4), as in Algorithm 1 (R = 4 A).
        budget: nats per sample: None for the loss's own, a constant, or (upper, lower) for a cosine from upper to
            lower within each ``budget_period``, as the authors' CIFAR script has it.
        budget_period: epochs from one restart of the budget to the next; None for ``period``.
        budget_decay: the upper budget is multiplied by this at each restart, in (0, 1], but never below the lower.
        rule: ``"cosine"``: as above. ``"adaptive"``: the same, but the largest multiplier doubles, up to
            ``multiplier_cap``, at the end of a period whose last epoch exceeded the budget (our reading: the paper
            updates its bounds "to enforce the constraint" without saying how). ``"ascent"``: dual ascent, multiplier +=
            ascent_rate * (mean usage - budget) of the finished epoch, clamped to ``multiplier``, starting at its
            smaller end.
        ascent_rate: step of ``"ascent"``, multiplier per nat, > 0.
        multiplier_cap: upper bound of the doubling in ``"adaptive"``.

    Attributes:
        note: the warning given at construction, or None.

    Raises:
        ValueError: values out of range; settings of a budget for a loss with a number as discount or ``UniformGuide``.
        TypeError: ``loss`` is not a ``DiSKLoss``, or values of another type.
        RuntimeError: ``dual(epoch)`` under ``"ascent"``, where the multiplier depends on the run; ``step()`` under
            ``"adaptive"`` or ``"ascent"`` without a training batch since the last one.

    Examples:
        >>> from disk_plugin import DiSKLoss, DualScheduler, GuideHead
        >>> dual = DualScheduler(DiSKLoss(GuideHead(10)), epochs=8, multiplier=(0.0, 40.0))
        >>> [round(dual(epoch)[0]) for epoch in range(9)]
        [0, 20, 0, 20, 0, 20, 0, 20, 40]
    """

    def __init__(
        self,
        loss: DiSKLoss,
        *,
        epochs: int,
        multiplier: tuple[float, float] | None = None,
        period: int | None = None,
        budget: float | tuple[float, float] | None = None,
        budget_period: int | None = None,
        budget_decay: float = 1.0,
        rule: Literal["cosine", "adaptive", "ascent"] = "cosine",
        ascent_rate: float = 1.0,
        multiplier_cap: float = 1000.0,
    ) -> None:
        if not isinstance(loss, DiSKLoss):
            raise TypeError(f"loss must be a DiSKLoss (not a wrapper around it), got {type(loss).__name__}")
        _checks.integer("epochs", epochs, at_least=1)
        budget_asked = asks_for_budget(
            loss, rule, multiplier=multiplier, period=period, budget=budget, budget_period=budget_period
        )
        scheduled = period is not None or rule != "cosine" or (budget_asked and loss.level is not None)
        bounds = multiplier_bounds(loss, multiplier, scheduled=scheduled)
        self.multiplier_min, self.multiplier_max = bounds
        if self.multiplier_min > self.multiplier_max:
            raise ValueError(f"multiplier must be (smallest, largest), got {multiplier}")
        for name, value in {"period": period, "budget_period": budget_period}.items():
            if value is not None:
                _checks.integer(name, value, at_least=1)
        self._budget_from_loss = budget is None
        budget = loss.budget.item() if budget is None else budget
        both = budget if isinstance(budget, tuple | list) else (budget, budget)
        self.budget_high, self.budget_low = pair("budget", both)
        if self.budget_high < self.budget_low:
            raise ValueError(f"budget must be a number or (upper, lower), got {budget}")
        _checks.number("budget_decay", budget_decay, above=0, at_most=1)
        _checks.number("ascent_rate", ascent_rate, above=0)
        _checks.number("multiplier_cap", multiplier_cap, at_least=self.multiplier_max if rule == "adaptive" else 0)
        _checks.choice("rule", rule, ("cosine", "adaptive", "ascent"))
        self.loss, self.epochs, self.rule, self.budget_decay = loss, int(epochs), rule, float(budget_decay)
        self.period = math.ceil(epochs / 4) if period is None else period
        self.budget_period = self.period if budget_period is None else budget_period
        self.ascent_rate, self.multiplier_cap = float(ascent_rate), float(multiplier_cap)
        self.epoch = 0
        self._ascent_multiplier = self.multiplier_min
        self._warned: set[str] = set()
        self._moves = GuideMoves(loss)
        if budget_asked and loss.level is not None:
            switch_to_budget(loss)
        self._level = level_of(loss)  # depends on the training progress
        loss.reset_statistics()
        self._write(ends_epoch=False)
        self.note = self._note()
        self._warn("low", self.note)

    def __call__(self, epoch: int) -> tuple[float, float]:
        """Return (multiplier, budget) of an epoch, counted from 0; a pure function of ``epoch`` and the bounds."""
        if self.rule == "ascent":
            raise RuntimeError("under rule='ascent' the multiplier depends on the run: read loss.multiplier instead")
        _checks.integer("epoch", epoch, at_least=0)
        return self._cosine_multiplier(epoch), self._budget(epoch)

    def step(self) -> None:
        """End an epoch: check the guide, then write the next epoch's multiplier, budget and progress into the loss."""
        self._warn("late", _watch.past_the_end(self.epoch, self.epochs))
        self._warn("untrained", self._moves.judge(self.epoch))
        self._warn("restarted", _watch.restarted(self._level, self.epoch / self.epochs))
        seen, (batches, bad) = self.loss.statistics(), self.loss.epoch_batches.tolist()
        self._warn("not finite", _watch.not_finite(batches, bad, self.epoch))
        middle = (self.multiplier_min + self.multiplier_max) / 2
        pulled_down = 1.1 * self.loss.multiplier.item() >= middle  # a period of two epochs reaches the middle
        if self.loss.level is None and any(True for _ in self.loss.guide.parameters()):  # a trained guide
            self._warn("dead", _watch.dead_guide(seen, self.epoch, pulled_down=pulled_down))
        self._warn("unreachable", _watch.unreachable(self._level, seen))
        if self.rule != "cosine" and not seen.positions:
            came = f"{bad:.0f}, all with a NaN or inf loss" if bad else "none"
            raise RuntimeError(f"step() with rule={self.rule!r} needs a training batch since the last step, got {came}")
        violation = seen.usage - self._budget(self.epoch)
        self.epoch += 1
        if self.rule == "ascent":
            moved = self._ascent_multiplier + self.ascent_rate * violation
            self._ascent_multiplier = min(max(moved, self.multiplier_min), self.multiplier_max)
        elif self.rule == "adaptive" and violation > 0 and self._starts_period(self.epoch):
            self.multiplier_max = min(2 * self.multiplier_max, self.multiplier_cap)
        self._write(ends_epoch=True)
        self.loss.reset_statistics()

    def state_dict(self) -> dict[str, Any]:
        """Return the progress, the budget and what the rule may change; the rest is the constructor's."""
        return {
            "epoch": self.epoch,
            "multiplier_max": self.multiplier_max,
            "budget": [self.budget_high, self.budget_low],
            "ascent_multiplier": self._ascent_multiplier,
            "warned": "dead" in self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the progress and write its values into the loss; a budget given to the constructor stays.

        Raises:
            RuntimeError: entries missing or unknown.
        """
        if set(state) != set(self.state_dict()):
            raise RuntimeError(f"expected a state with {sorted(self.state_dict())}, got {sorted(state)}")
        self.epoch = state["epoch"]
        if self.rule == "adaptive":  # progress under this rule, a setting under the others
            self.multiplier_max = state["multiplier_max"]
        if self._budget_from_loss:  # the fresh loss may not know the budget that the saved one was built with
            self.budget_high, self.budget_low = state["budget"]
        self._ascent_multiplier = state["ascent_multiplier"]
        self._warned = {"restarted", "dead"} if state["warned"] else {"restarted"}
        self._write(ends_epoch=False)

    @torch.no_grad()
    def _write(self, *, ends_epoch: bool) -> None:
        ascent = self.rule == "ascent"
        self.loss.multiplier.fill_(self._ascent_multiplier if ascent else self._cosine_multiplier(self.epoch))
        self.loss.budget.fill_(self._budget(self.epoch))
        if self._level is not None:
            self._level.set_progress(self.epoch / self.epochs, ends_epoch=ends_epoch)

    def _last_start(self) -> int:
        """Return the epoch of the last restart, after which at least a full period is left."""
        return max(self.epochs // self.period - 1, 0) * self.period

    def _starts_period(self, epoch: int) -> bool:
        return epoch % self.period == 0 and epoch <= self._last_start()

    def _cosine_multiplier(self, epoch: int) -> float:
        """Line 8 of Algorithm 1."""
        start, length = epoch - epoch % self.period, self.period
        if epoch >= self._last_start():
            start, length = self._last_start(), self.epochs - self._last_start()
        if epoch - start >= length:
            return self.multiplier_max  # exactly, whatever the cosine rounds to
        rise = (1 - math.cos(math.pi * (epoch - start) / length)) / 2
        return self.multiplier_min + (self.multiplier_max - self.multiplier_min) * rise

    def _budget(self, epoch: int) -> float:
        """Return the cosine from the decayed upper budget to the lower, restarted each period; constant if equal."""
        restarts, position = divmod(epoch, self.budget_period)
        high = max(self.budget_high * self.budget_decay**restarts, self.budget_low)
        fall = (1 + math.cos(math.pi * position / self.budget_period)) / 2
        return self.budget_low + (high - self.budget_low) * fall

    def _note(self) -> str | None:
        if self._level is not None:
            return _watch.single_step(self._level, self.epochs)
        falling = _watch.constant_budget(self.budget_high, self.budget_low, self.budget_period)
        if self.rule == "ascent":
            return falling
        highest = max(self._cosine_multiplier(epoch) for epoch in range(self.epochs))
        return _watch.low_multiplier(highest, self.multiplier_max, self.epochs) or falling

    def _warn(self, kind: str, message: str | None) -> None:
        if message is not None and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=3)
