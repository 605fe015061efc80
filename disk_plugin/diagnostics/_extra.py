"""Lazy imports of the extra ``plots``."""

import importlib
from types import ModuleType


def extra(name: str) -> ModuleType:
    """Import a module of the extra ``plots``.

    Raises:
        ImportError: it cannot be imported; the message holds the pip line.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"disk_plugin.diagnostics needs {name.partition('.')[0]}, which cannot be imported here: "
            "pip install 'disk-plugin[plots]'"
        ) from error
