"""Checks timm's version: ``trainable_module`` and ``task_state``, which DiSK builds on, came with 1.0.27."""

from types import ModuleType

from ..requirement import require


def require_timm() -> ModuleType:
    """Import timm and check its version.

    Raises:
        ImportError: it is absent or too old; the message holds the pip line.
    """
    return require(
        "timm",
        "1.0.27",
        "pip install 'timm>=1.0.27'",
        because=", whose tasks have trainable_module and task_state",
        advice=", or check out a newer tag beside its train.py",
    )
