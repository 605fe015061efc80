"""The flags of distillation methods: which one, what weighs it, and its own settings by its signature."""

import argparse
from collections.abc import Callable
from typing import Any

from disk_plugin.features import METHODS
from disk_plugin.features.guided import FEATURE_WEIGHTS, Guided
from disk_plugin.features.launching import explained, settings_of

_CRITERIONS = {"ce_weight"}  # a method's own cross-entropy: the host has a criterion


def add_methods(flag: Callable[..., None]) -> None:
    """Add them by ``flag(name, text, default, **how)``."""
    chosen = ["none", *METHODS]
    method = "distill by this method, weighted by the guide, instead of the logits; --distill-loss-weight weighs it"
    flag("method", method, "none", choices=chosen)
    flag("feature-matching", "the first name of --disk-method", "none", choices=chosen)
    weight = "what weighs a sample of the method's loss"
    default = settings_of(Guided)["weight"]
    flag("feature-weight", weight, default, "weight", choices=list(FEATURE_WEIGHTS))  # stored under its first name
    for name, kind in METHODS.items():
        for argument, default in method_settings(name).items():
            how: dict[str, Any] = {"type": type(default), "metavar": argument.upper()}
            if isinstance(default, bool):
                how = {"action": argparse.BooleanOptionalAction}
            flag(f"{name}-{argument}".replace("_", "-"), f"{name}: {explained(kind, argument)}", default, **how)


def method_settings(name: str) -> dict[str, Any]:
    """Return the settings of a method that have a flag, with their defaults."""
    return {key: value for key, value in settings_of(METHODS[name]).items() if key not in _CRITERIONS}


def chosen_method(args: argparse.Namespace) -> str:
    """Return the method's name, ``"none"`` for DiSK, under whichever of its two flags it was given.

    Raises:
        ValueError: two of them; an unknown one.
    """
    given = {getattr(args, f"disk_{flag}") for flag in ("method", "feature_matching")} - {"none"}
    if len(given) > 1:
        raise ValueError(f"--disk-method and --disk-feature-matching are one setting, got {sorted(given)}")
    name = given.pop() if given else "none"
    if name not in ("none", *METHODS):
        raise ValueError(f"disk_method must be one of {['none', *METHODS]}, got {name!r}")
    return name
