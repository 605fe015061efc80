"""States to save, and whether there are several ranks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch import distributed as dist


def several_processes() -> bool:
    """Whether training runs on more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a state's tensors, which are live, at any depth."""
    return {name: copied(each) if isinstance(each, Mapping) else _cloned(each) for name, each in state.items()}


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
