"""SGD whose learning rate is a tensor on the device, so that one recorded step serves a whole schedule."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class SGD:
    """``torch.optim.SGD`` with momentum and weight decay, without anything that is read on the host.

    Args:
        parameters: what it moves, in place.
        momentum: of the velocity.
        weight_decay: added to the gradient, times the parameter.
    """

    def __init__(self, parameters: Iterable[Tensor], momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        self.parameters, self.momentum, self.weight_decay = list(parameters), momentum, weight_decay
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: Tensor) -> None:
        """Move by gradients in the parameters' order; ``lr`` is a scalar on their device."""
        if not self.parameters:
            return
        change = torch._foreach_add(list(gradients), self.parameters, alpha=self.weight_decay)
        torch._foreach_mul_(self.velocity, self.momentum)
        torch._foreach_add_(self.velocity, change)
        torch._foreach_sub_(self.parameters, torch._foreach_mul(self.velocity, lr))


def cosine(lr: float, steps: int) -> Tensor:
    """Return the learning rate of each step, (steps,): that of ``CosineAnnealingLR`` stepped after each."""
    return torch.tensor([lr * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)])
