"""The settings of Algorithm 1's alternation."""

import inspect
from dataclasses import dataclass

from .. import _checks
from ..presets import PAPER
from ..replay import GuideReplay

_PAPER = PAPER["recipe"]
_REPLAY = inspect.signature(GuideReplay).parameters


@dataclass(frozen=True)
class Recipe:
    """How guide and student passes alternate; defaults are the paper's.

    An outer iteration is ``guide_passes`` over the data that train the guide alone, then ``student_passes``, epochs of
    the host, that train the student alone.

    Raises:
        ValueError: too few passes.
        TypeError: values of another type.
    """

    guide_passes: int = _PAPER["guide_passes"]  # over the data, before each group of student passes
    student_passes: int = _PAPER["student_passes"]  # epochs of the host in such a group
    guide_warmup_passes: int = 0  # guide passes before anything else
    replay: bool = False  # guide passes after the first ones: on a record of the last student pass, not over the data
    replay_capacity: int = _REPLAY["capacity"].default  # samples that each process records at most
    replay_batch_size: int = _REPLAY["batch_size"].default  # of the record, in each process

    def __post_init__(self) -> None:
        """Validate the numbers."""
        leasts = {"guide_warmup_passes": 0}
        for name in ("guide_passes", "student_passes", "guide_warmup_passes", "replay_capacity", "replay_batch_size"):
            _checks.integer(name, getattr(self, name), at_least=leasts.get(name, 1))
        if not isinstance(self.replay, bool):
            raise TypeError(f"replay must be a bool, got {type(self.replay).__name__} {self.replay!r}")

    def due(self, epoch: int, *, fresh: bool) -> int:
        """Return how many passes over the data come before the host's epoch, counted from 0; ``fresh``: none yet."""
        if fresh:
            return self.guide_warmup_passes + self.guide_passes
        return self.guide_passes if epoch % self.student_passes == 0 and not self.replay else 0

    def ends_iteration(self, epoch: int) -> bool:
        """Say whether the host's epoch, counted from 0, is the last of its group: the one that a replay records."""
        return (epoch + 1) % self.student_passes == 0
