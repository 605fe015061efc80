"""Gradient clipping by one global norm, over student and guide."""

from collections.abc import Iterator

from torch import nn

from disk_plugin.training.clipping import shorten


def clip_together(student: list[nn.Parameter], guide: list[nn.Parameter], *, shortened: bool) -> Iterator[nn.Parameter]:
    """Yield both; the guide's gradient is scaled down during iteration, as the caller iterates after the backward."""
    yield from student
    if shortened:
        shorten(guide, student)
    yield from guide
