"""Clipping student and guide by one global norm."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import Variable


@torch.no_grad()
def shorten(guide: Iterable[nn.Parameter], student: Iterable[nn.Parameter]) -> None:
    """Scale the guide's gradient down to the length of the student's; a loss scaler's factor cancels.

    Called before a clip by their common norm, it leaves the student at least 1/sqrt(2) of the step that a clip without
    a guide would.
    """
    gradients = [[p.grad for p in parameters if p.grad is not None] for parameters in (guide, student)]
    if not all(gradients):
        return
    lengths = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(each))) for each in gradients]
    factor = (lengths[1] / lengths[0]).nan_to_num(nan=1.0).clamp(max=1.0)
    for gradient in gradients[0]:
        gradient.mul_(factor.to(gradient.dtype))


def call_after_backward(loss: Tensor, function: Callable[[], None]) -> None:
    """Call a function at the end of the loss's backward, for a host whose backward and clip are one function."""
    loss.register_hook(lambda _: Variable._execution_engine.queue_callback(function))  # type: ignore[no-untyped-call]
