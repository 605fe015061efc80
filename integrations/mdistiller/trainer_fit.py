"""Which distillers a trainer of the host suits, read from its code before anything is started."""

import ast
import inspect
import textwrap
from typing import Any, NamedTuple

_SHOWN = ("image", "target", "epoch")  # what this package's distillers are called with


class Fit(NamedTuple):
    """What a trainer's code says."""

    passes: frozenset[str]  # the keywords of its calls of the distiller; empty if there are none to be seen
    reads: frozenset[str]  # the losses that it reads by name


def fit_of(trainer: type) -> Fit:
    """Read the host's part of a trainer."""
    trees = [tree for name in ("train_iter", "train_epoch") if (tree := _tree(trainer, name)) is not None]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.distiller"]
    read = {
        node.slice.value
        for node in nodes
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and "loss" in node.value.id
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    }
    passed = frozenset(word.arg for call in calls for word in call.keywords if word.arg)
    return Fit(passed, frozenset(read))


def unfit(trainer: type) -> str | None:
    """Return why a trainer cannot train a distiller of this package, or None."""
    fit = fit_of(trainer)
    if fit.passes and not fit.passes >= set(_SHOWN):
        return f"calls the distiller with {', '.join(sorted(fit.passes))} instead of {', '.join(_SHOWN)}"
    if fit.reads:
        return f"reads {', '.join(sorted(fit.reads))}, which only distillers with these losses have"
    return None


def _tree(trainer: type, name: str) -> ast.AST | None:
    """Parse the method that the host defines; None where its source is not to be had."""
    own: Any = next((vars(kind)[name] for kind in trainer.__mro__ if _is_hosts(kind) and name in vars(kind)), None)
    try:
        return None if own is None else ast.parse(textwrap.dedent(inspect.getsource(own)))
    except (OSError, TypeError, SyntaxError):
        return None


def _is_hosts(kind: type) -> bool:
    return not kind.__module__.startswith(__package__ or "disk_plugin")
