"""Steps a ``DualScheduler`` in epochs of a host."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from .._form import has_budget
from .._watch import ignoring_note
from ..distributed import share_statistics
from ..loss import DiSKLoss
from ..schedule import DualScheduler


class Schedule:
    """A ``DualScheduler`` that steps once per outer iteration of Algorithm 1, so that the guide sees each multiplier.

    Args:
        dual: the scheduler; None for constants.
        epochs_per_iteration: the student's passes in an outer iteration; 1 if guide and student train jointly.

    Attributes:
        epoch: of the host, counted from 0.
    """

    def __init__(self, dual: DualScheduler | None, epochs_per_iteration: int = 1) -> None:
        self.dual, self.epoch, self.epochs_per_iteration = dual, 0, epochs_per_iteration

    @classmethod
    def spanning(
        cls, disk: DiSKLoss, epochs: int | None, epochs_per_iteration: int = 1, dual: Mapping[str, Any] | None = None
    ) -> "Schedule":
        """Build a schedule over ``epochs`` of the host (None for constants), with keywords of ``DualScheduler``."""
        if epochs is None:
            return cls(None, epochs_per_iteration)
        dual = dict(dual or {})
        if has_budget(disk) and dual.get("budget") is None:
            dual["budget"] = float(disk.budget)  # given here, a checkpoint's does not override it
        with ignoring_note():  # a host tells ``note`` itself
            scheduler = DualScheduler(disk, epochs=math.ceil(epochs / epochs_per_iteration), **dual)
        return cls(scheduler, epochs_per_iteration)

    @property
    def note(self) -> str | None:
        """The scheduler's warning at construction, for the host's log."""
        return None if self.dual is None else self.dual.note

    def warn(self) -> None:
        """Give ``note`` as a warning, in a host that has no log of its own."""
        if self.note is not None:
            warnings.warn(self.note, stacklevel=2)

    def begin(self, epoch: int) -> None:
        """Set the scheduler to an epoch of the host, counted from 0."""
        self.epoch = epoch
        iteration = epoch // self.epochs_per_iteration
        if self.dual is None or self.dual.epoch == iteration:
            return
        if self.dual.epoch < iteration and self.dual.loss.statistics().positions:
            # resumed from the middle of an epoch, whose rest the host skips: end it with its statistics so far
            share_statistics(self.dual.loss)
            self.dual.step()
        self.dual.load_state_dict({**self.dual.state_dict(), "epoch": iteration})
        self.dual.loss.reset_statistics()

    def end(self) -> None:
        """End the epoch and, if it is the iteration's last, step the scheduler."""
        self.epoch += 1
        if self.dual is not None and self.epoch % self.epochs_per_iteration == 0:
            share_statistics(self.dual.loss)
            self.dual.step()
