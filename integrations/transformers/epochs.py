"""Callback that begins and ends the epochs of the schedule."""

from typing import Any

from transformers import TrainerCallback


class GuidedEpochs(TrainerCallback):
    """Begins and ends the schedule's epochs; zeroes the guide's gradients, which ``model.zero_grad()`` does not."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.epoch = trainer, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the schedule; begin its first epoch if that is not the Trainer's."""
        self.trainer._begin_training()
        steps = self.steps = self.trainer._schedule_steps
        # a checkpoint of an epoch's last step is one of the next epoch
        self.epoch = int(state.epoch or 0) if steps is None else state.global_step // steps
        if steps is not None:
            self._begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an epoch of the schedule."""
        if self.steps is None:
            self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero the guide's gradients; step a schedule that counts steps."""
        self.trainer.guided.zero_grad()
        if self.steps is None:
            return
        complete = state.global_step % self.steps == 0
        if complete or state.global_step >= state.max_steps:
            self._end(complete)
        if complete and state.global_step < state.max_steps:
            self._begin()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an epoch of the schedule."""
        if self.steps is None:
            self._end(float(state.epoch).is_integer())

    def _begin(self) -> None:
        self.trainer.guided_training.begin_epoch(self.epoch)

    def _end(self, complete: bool) -> None:
        self.trainer._end_epoch(complete=complete)
        self.epoch += 1
