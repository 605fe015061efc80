"""For launchers: a method's settings as flags or keys, and import of the user's own methods."""

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .method import Method

# names of the parts of a run in flags, keys and checkpoints
_RESERVED = {"disk", "distiller", "guide", "method", "none", "student", "teacher"}


def settings_of(kind: type) -> dict[str, Any]:
    """Return settings and their defaults: the keyword-only arguments of ``__init__`` that a flag can hold.

    A tuple of numbers is returned as a list, which is what flags and YAML files hold.
    """
    parameters = inspect.signature(kind).parameters.values()
    return {
        each.name: list(each.default) if isinstance(each.default, tuple) else each.default
        for each in parameters
        if each.kind is each.KEYWORD_ONLY and _can_be_set(each.default)
    }


def _can_be_set(default: Any) -> bool:
    if isinstance(default, tuple):
        return bool(default) and all(isinstance(each, float) for each in default)
    return isinstance(default, bool | int | float | str)


def explained(kind: type[Method], setting: str) -> str:
    """Return the first sentence about a setting in the docstring's ``Args``, or its name if there is none."""
    found = re.search(rf"^\s+{setting}: (.+?)(?=\n\s*\n|\n\s+\w+: |\Z)", inspect.getdoc(kind) or "", re.M | re.S)
    if not found:
        return setting.replace("_", " ")
    return re.split(r"\.(?:\s|$)", re.sub(r"\s+", " ", found[1]).replace("`", ""))[0]


def import_methods(modules: Iterable[str], known: Mapping[str, type[Method]], *, flag: str) -> dict[str, type[Method]]:
    """Import the user's own modules and return the methods that they define, by the class's name in lower case.

    A module may also add models or datasets to the host's tables, or define no method at all.

    Args:
        modules: dotted names.
        known: existing methods, whose names cannot be taken.
        flag: the flag that named the modules, for messages.

    Raises:
        ImportError: a module cannot be found, or raises.
        ValueError: a method has the name of an existing one.
    """
    found: dict[str, type[Method]] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # the user's own module may raise anything
            raise ImportError(f"{flag} must name a module that can be imported, got {name}: {error}") from error
        for value in vars(module).values():
            own = inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
            if not own or inspect.isabstract(value):
                continue
            key = value.__name__.lower()
            if known.get(key, value) is not value or key in _RESERVED:
                raise ValueError(f"{flag} {name} defines {value.__name__}, but {key} is there already: rename it")
            found[key] = value
    return found
