"""Gradient clipping by one global norm, over student and guide."""

from collections.abc import Iterator

import torch
from torch import nn


def clip_together(student: list[nn.Parameter], guide: list[nn.Parameter], *, shortened: bool) -> Iterator[nn.Parameter]:
    """Yield both; the guide's gradient is scaled down during iteration, as the caller iterates after the backward."""
    yield from student
    if shortened:
        _shorten(guide, student)
    yield from guide


@torch.no_grad()
def _shorten(guide: list[nn.Parameter], student: list[nn.Parameter]) -> None:
    """Scale the guide's gradient down to the norm of the student's; a loss scaler's factor cancels."""
    lengths = []
    for parameters in (guide, student):
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        lengths.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    factor = (lengths[1] / lengths[0]).nan_to_num(nan=1.0).clamp(max=1.0)
    for parameter in guide:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
