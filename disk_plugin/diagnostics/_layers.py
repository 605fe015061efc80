"""What a student's layers tell of it: the width of the last one, and whether it is convolutional."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def last_linear(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Keep the last Linear that ran, which need not be the last one that was registered."""
    last: list[nn.Linear] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        last[:] = [module]

    hooks = [module.register_forward_hook(keep) for module in linears(model)]
    try:
        yield last
    finally:
        for hook in hooks:
            hook.remove()


def linears(model: nn.Module) -> list[nn.Linear]:
    """Return all Linears as registered: hooks on the parts of a compiled model may not run."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def input_width(last: list[nn.Linear], num_classes: int) -> int | None:
    """Return the width of what a Linear reads, if it has one output per class, else None."""
    return last[0].in_features if last and last[0].out_features == num_classes else None


def overlaps(module: nn.Module) -> bool:
    """Whether a module is a convolution with overlapping windows; most transformers cut patches that do not overlap."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return any(side > stride for side, stride in zip(module.kernel_size, module.stride, strict=True))
