"""What a launcher makes of methods: their settings as flags or keys, and methods of the user's own by an import."""

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .method import Method

# what the parts of a run are called, in flags, keys and checkpoints
_RESERVED = {"disk", "distiller", "guide", "method", "none", "student", "teacher"}


def settings_of(kind: type) -> dict[str, Any]:
    """Return the default of each setting: the keyword-only arguments of ``__init__`` that a flag can hold."""
    parameters = inspect.signature(kind).parameters.values()
    return {
        each.name: each.default
        for each in parameters
        if each.kind is each.KEYWORD_ONLY and isinstance(each.default, bool | int | float | str)
    }


def explained(kind: type[Method], setting: str) -> str:
    """Return the first sentence of what the docstring's ``Args`` say of a setting, its name where they say nothing."""
    found = re.search(rf"^\s+{setting}: (.+?)(?=\n\s*\n|\n\s+\w+: |\Z)", inspect.getdoc(kind) or "", re.M | re.S)
    if not found:
        return setting.replace("_", " ")
    return re.split(r"\.(?:\s|$)", re.sub(r"\s+", " ", found[1]).replace("`", ""))[0]


def import_methods(modules: Iterable[str], known: Mapping[str, type[Method]], *, flag: str) -> dict[str, type[Method]]:
    """Import modules of the user's own and return the methods that they define, by the class's name in lower case.

    A module may also add models or datasets to the host's tables, or define no method at all.

    Args:
        modules: dotted names.
        known: methods that there are, whose names cannot be taken.
        flag: how the user named the modules, for the messages.

    Raises:
        ImportError: a module cannot be found, or fails.
        ValueError: a method has a known name.
    """
    found: dict[str, type[Method]] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever the module raises is the user's to read
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
