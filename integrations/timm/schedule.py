"""When the discount's target, or multiplier and budget, step, in epochs of the host."""

import math
from collections.abc import Mapping
from typing import Any

from disk_plugin import DiSKLoss, DualScheduler
from disk_plugin._watch import low_multiplier_unwarned
from disk_plugin.distributed import share_statistics


class Schedule:
    """A ``DualScheduler`` that steps once per outer iteration of Algorithm 1, so that the guide sees each multiplier.

    Args:
        disk: the loss to drive.
        epochs: of the host; None for a constant multiplier.
        epochs_per_iteration: the student's passes in an outer iteration; 1 in joint mode.
        dual: keywords of ``DualScheduler``.
    """

    def __init__(
        self, disk: DiSKLoss, epochs: int | None, epochs_per_iteration: int, dual: Mapping[str, Any] | None
    ) -> None:
        self.epoch, self.epochs_per_iteration = 0, epochs_per_iteration
        self.dual: DualScheduler | None = None
        if epochs is not None:
            dual = dict(dual or {})
            if disk.level is None and dual.get("budget") is None:
                dual["budget"] = float(disk.budget)  # given here it is not overridden by a checkpoint's
            with low_multiplier_unwarned():  # the launcher logs the note
                self.dual = DualScheduler(disk, epochs=math.ceil(epochs / epochs_per_iteration), **dual)

    def begin(self, epoch: int) -> None:
        """Bring the scheduler to an epoch of the host, counted from 0."""
        self.epoch = epoch
        iteration = epoch // self.epochs_per_iteration
        if self.dual is None or self.dual.epoch == iteration:
            return
        if self.dual.epoch < iteration and self.dual.loss.statistics().positions:
            # resumed from the middle of an epoch, whose rest the host skips: end it with what it showed
            share_statistics(self.dual.loss)
            self.dual.step()
        self.dual.load_state_dict({**self.dual.state_dict(), "epoch": iteration})
        self.dual.loss.reset_statistics()

    def end(self) -> None:
        """End the epoch, and with its last epoch the iteration."""
        self.epoch += 1
        if self.dual is not None and self.epoch % self.epochs_per_iteration == 0:
            share_statistics(self.dual.loss)
            self.dual.step()
