"""Many random starts of a tiny module as one: parameters stacked along dimension 0, called by ``torch.func``."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 0.01  # appendices A.1 and A.2


class Problem(NamedTuple):
    """Inputs (N, D), labels (N,), the teacher's logits (N, C) and features (N, F); also a batch of it."""

    x: Tensor
    y: Tensor
    teacher_logits: Tensor
    teacher_features: Tensor


class Starts:
    """Modules of one class, stacked: parameters and buffers (S, ...)."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.count, self.module = len(modules), copy.deepcopy(modules[0])
        self.parameters, self.buffers = stack_module_state(modules)

    def __call__(self, *inputs: Any, in_dims: int | tuple[int | None, ...], method: str = "forward") -> Any:
        """Call every start's module on its slice of the inputs with in_dims 0, and on all of those with None."""
        caller = _Method(self.module, method)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *own: Any) -> Any:
            state = {f"module.{name}": value for name, value in (parameters | buffers).items()}
            return functional_call(caller, state, own)

        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(inputs)
        return vmap(one, in_dims=(0, 0, *dims))(self.parameters, self.buffers, *inputs)

    def train(self, mode: bool) -> "Starts":
        """Set the modules' mode, as nn.Module.train does."""
        self.module.train(mode)
        return self

    def flat(self) -> Tensor:
        """Return all parameters of each start as a row, (S, P)."""
        return torch.cat([value.detach().flatten(1) for value in self.parameters.values()], 1).clone()

    @torch.no_grad()
    def clamp(self, low: float, high: float) -> None:
        """Clamp all parameters, in place."""
        for value in self.parameters.values():
            value.clamp_(low, high)

    def sgd(self, lr: float = LEARNING_RATE, weight_decay: float = WEIGHT_DECAY) -> torch.optim.SGD:
        """Return an optimizer of all starts."""
        return torch.optim.SGD(self.parameters.values(), lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)


class _Method(nn.Module):
    """Wrap a module so that its forward, which functional_call calls, is another of its methods."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.module, self.method)(*inputs)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make one gradient step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
