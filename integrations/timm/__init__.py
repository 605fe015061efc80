"""DiSK in timm >= 1.0.27: as a ``TrainingTask``, and in timm's own ``train.py``, which is not edited.

From the command line: ``python -m disk_plugin.integrations.timm path/to/train.py ...``. In your own loop:
``from disk_plugin.integrations.timm import DiSKTask``. Run with timm 1.0.27, 1.0.28, 1.0.29.dev0 and 1.0.31.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .simkd import DiSKSimKDTask, SimKDModel
    from .task import DiSKTask

__all__ = ["DiSKSimKDTask", "DiSKTask", "SimKDModel"]


def __getattr__(name: str) -> Any:
    """Import timm only when needed, as the launcher first puts the script's own timm on the path."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .version import require_timm

    require_timm()
    from . import simkd, task

    return getattr(task if name == "DiSKTask" else simkd, name)
