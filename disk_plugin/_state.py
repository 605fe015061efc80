"""Buffers that are state, not weights: written in place wherever torch allows it, moved without losing digits."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .functional._positions import transformed


@torch.no_grad()
def write(buffer: Tensor, value: Tensor) -> bool:
    """Write in place; return False, with nothing written, where a transform of ``torch.func`` does not allow it.

    Such a transform changes nothing that it was not given: pass it the buffers, by ``torch.func.functional_call``.
    """
    if torch.compiler.is_compiling() or not transformed():
        buffer.copy_(value)
        return True
    try:
        buffer.copy_(value)
    except RuntimeError:
        return False
    return True


@contextmanager
def moving(module: nn.Module, move: Callable[[Tensor], Tensor], initial: Mapping[str, Any]) -> Iterator[None]:
    """Let a module's own buffers keep float64 while ``move`` is applied; off the meta device they start anew.

    They are counts and settings: rounded to a half type they would be others. MPS has float32 at most.
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
    """Let the module's own float64 buffers keep their type while ``move`` is applied; float32 where MPS has none."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if move(torch.empty(0)).device.type == "mps":
        module._buffers.update({name: buffer.float() for name, buffer in buffers.items()})
    yield
    for name, before in buffers.items():
        after = module._buffers[name]
        if after is not None and after.dtype != before.dtype and after.device.type != "mps":
            module._buffers[name] = before.to(after.device)
