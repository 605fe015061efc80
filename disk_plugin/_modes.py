"""Context managers for training mode, evaluation mode and autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Set training or evaluation mode; on exit each submodule's own mode is restored."""
    modes = {each: each.training for each in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Disable autocast for the tensor's device type, if it supports autocast."""
    device = tensor.device.type
    # dynamo of torch 2.9 and older traces autocast, but not this question
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()
