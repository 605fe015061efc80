"""Checks timm's version: ``trainable_module`` and ``task_state``, which DiSK builds on, came with 1.0.27."""

import re
from types import ModuleType

OLDEST = (1, 0, 27)
_PIP = "pip install 'timm>=1.0.27'"


def require_timm() -> ModuleType:
    """Import timm and check its version.

    Raises:
        ImportError: it is absent or too old; the message holds the pip line.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ImportError(f"disk_plugin.integrations.timm needs timm >= 1.0.27, found none: {_PIP}") from error
    found = tuple(int(number) for number in re.findall(r"\d+", timm.__version__)[:3])
    if found < OLDEST:
        raise ImportError(
            f"disk_plugin.integrations.timm needs timm >= 1.0.27, whose tasks have trainable_module and task_state, "
            f"got {timm.__version__} in {timm.__path__[0]}: {_PIP}, or check out a newer tag beside its train.py"
        )
    return timm
