"""The flags of distillation methods: which one, its weight, and its own settings from its signature."""

import argparse
from collections.abc import Callable
from typing import Any

from disk_plugin.features import METHODS
from disk_plugin.features.guided import FEATURE_WEIGHTS, Guided
from disk_plugin.features.launching import explained, settings_of

_CRITERIONS = {"ce_weight"}  # a method's own cross-entropy: the host has a criterion


def add_methods(flag: Callable[..., None]) -> None:
    """Add the flags by ``flag(name, text, default, **how)``."""
    chosen = ["none", *METHODS]
    method = "distill by this method, weighted by the guide, instead of the logits; its weight is --distill-loss-weight"
    flag("method", method, "none", choices=chosen)
    flag("feature-matching", "the former name of --disk-method", "none", choices=chosen)
    weight = "weight of a sample in the method's loss"
    default = settings_of(Guided)["weight"]
    flag("feature-weight", weight, default, "weight", choices=list(FEATURE_WEIGHTS))  # stored under its former name
    for name, kind in METHODS.items():
        for argument, default in method_settings(name).items():
            how: dict[str, Any] = {"type": type(default), "metavar": argument.upper()}
            if isinstance(default, bool):
                how = {"action": argparse.BooleanOptionalAction}
            elif isinstance(default, list):
                how |= {"type": float, "nargs": "*"}
            flag(f"{name}-{argument}".replace("_", "-"), f"{name}: {explained(kind, argument)}", default, **how)


def method_settings(name: str) -> dict[str, Any]:
    """Return the settings of a method that have a flag, with their defaults."""
    return {key: value for key, value in settings_of(METHODS[name]).items() if key not in _CRITERIONS}


def chosen_method(args: argparse.Namespace) -> str:
    """Return the method's name, ``"none"`` for DiSK, from either of its two flags.

    Raises:
        ValueError: two different names; an unknown one.
    """
    given = {getattr(args, f"disk_{flag}") for flag in ("method", "feature_matching")} - {"none"}
    if len(given) > 1:
        raise ValueError(f"--disk-method and --disk-feature-matching are one setting, got {sorted(given)}")
    name = given.pop() if given else "none"
    if name not in ("none", *METHODS):
        raise ValueError(f"disk_method must be one of {['none', *METHODS]}, got {name!r}")
    return name
