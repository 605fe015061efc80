"""What an adapter needs of its host: that it is there, and new enough."""

import re
from importlib import import_module
from types import ModuleType


def is_older(version: str, oldest: str) -> bool:
    """Return whether a version, such as ``"1.0.27.dev0"``, is before another by its numbers."""
    found, needed = (tuple(int(number) for number in re.findall(r"\d+", each)[:3]) for each in (version, oldest))
    return found < needed


def require(package: str, oldest: str, pip: str, *, because: str = "", advice: str = "") -> ModuleType:
    """Import an adapter's host and check its version.

    Args:
        package: the host's name, which the adapter has too.
        oldest: its oldest version that will do.
        pip: what installs it.
        because: why an older one will not do, after the version.
        advice: what else to do about an older one, after the pip line; the message then names its folder.

    Raises:
        ImportError: it is absent or too old; the message holds the pip line.
    """
    needs = f"disk_plugin.integrations.{package} needs {package} >= {oldest}"
    try:
        host = import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f"{needs}, found none: {pip}") from error
    if is_older(host.__version__, oldest):
        place = f" in {host.__path__[0]}" if advice else ""
        raise ImportError(f"{needs}{because}, got {host.__version__}{place}: {pip}{advice}")
    return host
