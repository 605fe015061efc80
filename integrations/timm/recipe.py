"""The settings of Algorithm 1's alternation."""

from dataclasses import dataclass

from disk_plugin.presets import PAPER

_PAPER = PAPER["recipe"]


@dataclass(frozen=True)
class Recipe:
    """How guide and student passes alternate, and the guide's own optimizer; defaults are the paper's.

    Raises:
        ValueError: too few passes.
    """

    guide_passes: int = _PAPER["guide_passes"]  # over the data, before each group of student passes
    student_passes: int = _PAPER["student_passes"]  # epochs of the host in such a group
    guide_warmup_passes: int = 0  # guide passes before anything else
    guide_opt: str = _PAPER["optimizer"]  # by timm's name
    guide_lr: float = _PAPER["lr"]  # falls to 0 as a cosine over the epochs
    guide_momentum: float = _PAPER["momentum"]
    guide_weight_decay: float = _PAPER["weight_decay"]

    def __post_init__(self) -> None:
        """Refuse numbers of passes that are none."""
        for name, least in (("guide_passes", 1), ("student_passes", 1), ("guide_warmup_passes", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

    def due(self, epoch: int, *, fresh: bool) -> int:
        """Return how many guide passes come before the host's epoch, counted from 0; ``fresh``: none came yet."""
        if fresh:
            return self.guide_warmup_passes + self.guide_passes
        return self.guide_passes if epoch % self.student_passes == 0 else 0
