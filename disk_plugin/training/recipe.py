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
    """How guide and student passes alternate in Algorithm 1; defaults are the paper's (A.5).

    An outer iteration is ``guide_passes`` passes over the data that train the guide alone, then ``student_passes``
    epochs of the host that train the student alone.

    Attributes:
        guide_passes: passes over the data before each group of student passes.
        student_passes: epochs of the host in such a group.
        guide_warmup_passes: further guide passes before everything else.
        replay: whether all guide passes after the first iteration's are on a record of the last student pass.
        replay_capacity: largest number of samples that each rank records.
        replay_batch_size: samples of the record in a step, on each rank.

    Raises:
        ValueError: too few passes.
        TypeError: values of another type.
    """

    guide_passes: int = _PAPER["guide_passes"]
    student_passes: int = _PAPER["student_passes"]
    guide_warmup_passes: int = 0
    replay: bool = False
    replay_capacity: int = _REPLAY["capacity"].default
    replay_batch_size: int = _REPLAY["batch_size"].default

    def __post_init__(self) -> None:
        """Validate the numbers."""
        leasts = {"guide_warmup_passes": 0}
        for name in ("guide_passes", "student_passes", "guide_warmup_passes", "replay_capacity", "replay_batch_size"):
            _checks.integer(name, getattr(self, name), at_least=leasts.get(name, 1))
        if not isinstance(self.replay, bool):
            raise TypeError(f"replay must be a bool, got {type(self.replay).__name__} {self.replay!r}")

    def due(self, epoch: int, *, fresh: bool) -> int:
        """Return the number of passes over the data due before ``epoch``, counted from 0; ``fresh``: none made yet."""
        if fresh:
            return self.guide_warmup_passes + self.guide_passes
        return self.guide_passes if epoch % self.student_passes == 0 and not self.replay else 0

    def ends_iteration(self, epoch: int) -> bool:
        """Return whether an epoch of the host, counted from 0, is the last of its group, which a replay records."""
        return (epoch + 1) % self.student_passes == 0
