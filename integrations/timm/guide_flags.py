"""The ``--disk-guide-*`` flags and ``--disk-uniform``, and the guide that they ask for."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from disk_plugin import GuideHead
from disk_plugin.uniform import UniformGuide

_SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
_NAMES = ("guide_use_features", "guide_use_logits", "guide_hidden_dims", "guide_norm")
SWITCHES = ("uniform", "guide_use_features", "guide_use_logits")
_BUDGETS = ("budget", "multiplier", "period", "budget_period")  # what asks for a budget, None by default


def add_guide(flag: Callable[..., None]) -> None:
    """Add the flags by the launcher's ``flag(name, text, default, **how)``."""
    default = {name: parameter.default for name, parameter in inspect.signature(GuideHead).parameters.items()}
    one = "no guide network but one g for all samples, which meets --disk-discount: the control of every guide"
    flag("uniform", one, False, **_SWITCH)
    flag("guide-use-features", "the guide reads the teacher's pre-logits", True, **_SWITCH)
    flag("guide-use-logits", "the guide reads the teacher's logits", default["use_logits"], **_SWITCH)
    dims = "widths of the guide's hidden layers"
    flag("guide-hidden-dims", dims, list(default["hidden_dims"]), type=int, nargs="+", metavar="WIDTH")
    flag("guide-norm", "the guide's normalisation", default["norm"], choices=["layer", "batch"])


def unused(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the flags that change nothing, by the setting that they need."""
    return {"--no-disk-uniform": list(_NAMES) if args.disk_uniform else []}


def check_uniform(args: argparse.Namespace) -> None:
    """Validate what goes with ``--disk-uniform``.

    Raises:
        ValueError: no discount, a budget, or Algorithm 1.
    """
    if not args.disk_uniform:
        return
    asked = [f"disk_{name}" for name in _BUDGETS if getattr(args, f"disk_{name}") is not None]
    if args.disk_discount is None or asked or args.disk_rule != "cosine":
        raise ValueError(
            f"--disk-uniform follows --disk-discount, auto or a number, and no budget: got discount "
            f"{args.disk_discount}, rule {args.disk_rule} and {asked or 'no budget'}"
        )
    if args.disk_mode == "alternating":
        raise ValueError("--disk-uniform has no guide that --disk-mode alternating could train")


def guide_of(args: argparse.Namespace) -> dict[str, Any] | UniformGuide:
    """Return the guide as ``DiSKTask`` takes it: arguments of ``GuideHead``, or the uniform one."""
    if args.disk_uniform:
        return UniformGuide(discount=args.disk_discount)
    return {
        "use_features": args.disk_guide_use_features,
        "use_logits": args.disk_guide_use_logits,
        "hidden_dims": tuple(args.disk_guide_hidden_dims),
        "norm": args.disk_guide_norm,
    }
