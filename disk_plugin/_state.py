"""Buffers that are state, not weights: written in place where torch allows it, moved without losing precision."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .functional._positions import transformed


@torch.no_grad()
def write(buffer: Tensor, value: Tensor) -> bool:
    """Write in place; return False, with nothing written, if a ``torch.func`` transform does not allow it.

    Such a transform may only mutate its inputs: pass it the buffers with ``torch.func.functional_call``.
    """
    if torch.compiler.is_compiling():
        # a view: dynamo of torch 2.7 to 2.10, if not later, loses what a method writes into a 0-dim float64 input
        buffer.view_as(buffer).copy_(value)
        return True
    if not transformed():
        buffer.copy_(value)
        return True
    try:
        buffer.copy_(value)
    except RuntimeError:
        return False
    return True


@contextmanager
def moving(module: nn.Module, move: Callable[[Tensor], Tensor], initial: Mapping[str, Any]) -> Iterator[None]:
    """Keep a module's own float64 buffers in float64 while ``move`` is applied; reinitialize them on leaving meta.

    They are counts and settings, which half precision would change. MPS has float32 at most.
    """
    was_meta = any(buffer.is_meta for buffer in module.buffers(recurse=False))
    with _keeping_float64(module, move):
        yield
    if was_meta and not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
        for name, value in initial.items():
            buffer = module._buffers[name]
            if buffer is not None:
                with torch.no_grad():
                    buffer.copy_(torch.tensor(value, dtype=torch.float64))


@contextmanager
def _keeping_float64(module: nn.Module, move: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Keep the module's own float64 buffers in float64 while ``move`` is applied; MPS has none and gets float32."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if move(torch.empty(0)).device.type == "mps":
        module._buffers.update({name: buffer.float() for name, buffer in buffers.items()})
    yield
    for name, before in buffers.items():
        after = module._buffers[name]
        if after is not None and after.dtype != before.dtype and after.device.type != "mps":
            module._buffers[name] = before.to(after.device)
