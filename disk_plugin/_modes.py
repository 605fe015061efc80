"""Training mode, evaluation mode and autocast for a while."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Set training or evaluation mode; afterwards each of its modules has its own mode again."""
    modes = {each: each.training for each in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off for the tensor's device, where that device has it."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
