"""The ``--disk-*`` flags, and their translation into keywords of DiSK's constructors, whose defaults they have.

Each is named after the argument it sets. Settings for which the host has a flag (``--kd-temperature``,
``--task-loss-weight``, ``--distill-loss-weight``, ``--smoothing``) have none here.
"""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import torch

from disk_plugin import DiSKLoss, DualScheduler
from disk_plugin._watch import ignoring_note
from disk_plugin.features import METHODS
from disk_plugin.features.guided import FEATURE_WEIGHTS
from disk_plugin.variants import VARIANTS

from . import guide_flags
from .guide_flags import SWITCHES, add_guide, check_uniform, guide_of
from .guide_module import build_guide, reads_features
from .method_flags import add_methods, chosen_method, method_settings
from .recipe import Recipe

INCOMPATIBLE = {
    "bce_loss": "a sigmoid per class leaves the softmax, which scaffold and budget read, undetermined",
    "jsd_loss": "its cross-entropy is on the first of each image's views only, the others only have to agree with it, "
    "while scaffold and budget need a cross-entropy of every row; --aug-splits without it works",
    "naflex_loader": "teacher and student must read the same images, not each its own patches",
    "torchscript": "a scripted student has no configuration to read",
}
_SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
MODES = ["joint", "alternating"]
_ALTERNATING: dict[str, tuple[str, dict[str, Any]]] = {
    "guide_passes": ("guide passes before each group of student passes", {"type": int, "metavar": "N"}),
    "student_passes": ("epochs in such a group", {"type": int, "metavar": "N"}),
    "guide_warmup_passes": ("guide passes before anything else", {"type": int, "metavar": "N"}),
    "guide_opt": ("the guide's optimizer, by timm's name", {"metavar": "NAME"}),
    "guide_lr": ("the guide's learning rate, falling to 0 as a cosine", {"type": float, "metavar": "LR"}),
    "guide_momentum": ("the guide's momentum", {"type": float, "metavar": "M"}),
    "guide_weight_decay": ("the guide's weight decay", {"type": float, "metavar": "WD"}),
    "replay": ("guide passes on a record of the student's, not over the data", _SWITCH),
    "replay_capacity": ("samples that each process records at most", {"type": int, "metavar": "N"}),
    "replay_batch_size": ("batch size of those passes, per process", {"type": int, "metavar": "N"}),
}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Read a number, or ``none``."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"
    return read


def _temperature(text: str) -> Any:
    return text if text == "fit" else _or_none(float)(text)


def _discount(text: str) -> Any:
    return text if text == "auto" else _or_none(float)(text)


_INT, _FLOAT = _or_none(int), _or_none(float)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags to the host's own parser, and so to its help, its args.yaml and its ``-c`` files."""
    group = parser.add_argument_group("DiSK")

    def flag(name: str, text: str, default: Any, *others: str, **how: Any) -> None:
        shown, stored = f"{text} (default: {default})".replace("%", "%%"), f"disk_{name}".replace("-", "_")
        spelled = [f"--disk-{each}" for each in (*others, name)]
        group.add_argument(*spelled, dest=stored, help=shown, default=default, **how)

    def of(target: Callable[..., Any], argument: str) -> Any:
        """Return the default in the signature, as in YAML."""
        value = inspect.signature(target).parameters[argument].default
        return list(value) if isinstance(value, tuple) else value

    flag("mode", "joint: one step for guide and student; alternating: Algorithm 1", "joint", choices=MODES)
    top_k = "scaffold the teacher's K largest classes; none for all"
    flag("top-k", top_k, of(DiSKLoss, "top_k"), type=_INT, metavar="K")
    discount = "share of the teacher's pull to take off in the mean: auto, a number, or none for --disk-budget"
    flag("discount", discount, of(DiSKLoss, "discount"), type=_discount, metavar="D")
    budget = "nats per sample, instead of the discount; two numbers for a schedule from upper to lower"
    flag("budget", budget, of(DiSKLoss, "budget"), type=float, nargs="+", metavar="NATS")
    multiplier = "smallest and largest multiplier of the budget; twice the same keeps it constant"
    flag("multiplier", multiplier, of(DualScheduler, "multiplier"), type=float, nargs=2, metavar=("MIN", "MAX"))
    period = "epochs between restarts of the multiplier; none for a quarter of --disk-epochs"
    flag("period", period, of(DualScheduler, "period"), type=_INT, metavar="N")
    budget_period = "epochs between restarts of the budget; none for --disk-period"
    flag("budget-period", budget_period, of(DualScheduler, "budget_period"), type=_INT, metavar="N")
    decay = "factor of the upper budget at each restart"
    flag("budget-decay", decay, of(DualScheduler, "budget_decay"), type=float, metavar="FACTOR")
    rules = ["cosine", "adaptive", "ascent"]
    flag("rule", "how the multiplier moves", of(DualScheduler, "rule"), choices=rules)
    rate = "step of the ascent, per nat"
    flag("ascent-rate", rate, of(DualScheduler, "ascent_rate"), type=float, metavar="RATE")
    cap = "bound of the adaptive rule's doubling"
    flag("multiplier-cap", cap, of(DualScheduler, "multiplier_cap"), type=float, metavar="MAX")
    flag("epochs", "epochs that the schedules span; none for the run's", None, type=_INT, metavar="N")
    temperature = "divides the student's logits: none for --kd-temperature, a number, or fit"
    flag("student-temperature", temperature, of(DiSKLoss, "student_temperature"), type=_temperature, metavar="T")
    variant = "rules of the paper, or of one of the authors' scripts"
    flag("variant", variant, of(DiSKLoss, "variant"), choices=sorted(VARIANTS))
    scale = "keeps the guide alive; none for the plain gradient"
    flag("guide-gradient-scale", scale, of(DiSKLoss, "guide_gradient_scale"), type=_FLOAT, metavar="C")
    add_guide(flag)
    for argument, (text, how) in _ALTERNATING.items():
        flag(argument.replace("_", "-"), f"alternating: {text}", of(Recipe, argument), **how)

    add_methods(flag)
    imported = "import your own modules, whose methods, models and datasets are then available by name"
    flag("import", imported, [], nargs="+", action="extend", metavar="MODULE")
    checkpoint = "the teacher's weights, in place of timm's pretrained ones"
    flag("teacher-checkpoint", checkpoint, None, metavar="FILE")
    flag("allow-fresh-guide", "resume with a new guide from a checkpoint without one", False, **_SWITCH)


def names() -> set[str]:
    """Return the flags' names in the parsed arguments."""
    return set(_defaults())


def _defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return vars(parser.parse_args([]))


def check(args: argparse.Namespace) -> None:
    """Validate the flags before the data is read; a ``-c`` file sets values that no parser has checked.

    Raises:
        ValueError: unknown names, values out of range, flags of the host that do not go with DiSK.
        TypeError: values of another type.
    """
    known = names()
    unknown = {name for name in vars(args) if name.startswith("disk_")} - known
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}")
    _check_host(args)
    chosen_method(args)
    for name, choices in (("mode", MODES), ("feature_weight", FEATURE_WEIGHTS)):
        if getattr(args, f"disk_{name}") not in choices:
            raise ValueError(f"disk_{name} must be one of {list(choices)}, got {getattr(args, f'disk_{name}')!r}")
    _check_types(args)
    _check_unused(args)
    check_uniform(args)
    # DiSK's own constructors validate the rest
    arguments = task_arguments(args, epochs=1)
    guide = arguments["guide"]
    pre_logits = torch.zeros(1, 1) if reads_features(guide) else None
    loss = DiSKLoss(build_guide(guide, torch.zeros(1, 2), pre_logits), **_loss(args))
    with ignoring_note():  # of one epoch
        DualScheduler(loss, epochs=arguments["epochs"], **arguments["dual"])
    Recipe(**arguments.get("alternating", {}))


def _check_types(args: argparse.Namespace) -> None:
    for name in (*SWITCHES, "replay", "allow_fresh_guide"):
        value = getattr(args, f"disk_{name}")
        if not isinstance(value, bool):
            raise TypeError(f"disk_{name} must be true or false, got {type(value).__name__} {value!r}")
    for name in ("guide_hidden_dims", "multiplier"):
        value = getattr(args, f"disk_{name}")
        if not isinstance(value, list) and (value is not None or name == "guide_hidden_dims"):
            raise TypeError(f"disk_{name} must be a list, got {type(value).__name__} {value!r}")


def _check_unused(args: argparse.Namespace) -> None:
    """Raise ValueError for settings of a part that is switched off, which would change nothing."""
    off = {
        "--disk-mode alternating": [] if args.disk_mode == "alternating" else list(_ALTERNATING),
        "--disk-replay": [] if args.disk_replay else ["replay_capacity", "replay_batch_size"],
        "--disk-method": [] if chosen_method(args) != "none" else ["feature_weight"],
        "--disk-rule ascent": [] if args.disk_rule == "ascent" else ["ascent_rate"],
        "--disk-rule adaptive": [] if args.disk_rule == "adaptive" else ["multiplier_cap"],
        **guide_flags.unused(args),
    }
    for name in METHODS:
        if name != chosen_method(args):
            off[f"--disk-method {name}"] = [f"{name}_{setting}" for setting in method_settings(name)]
    for needed, unused in off.items():
        for name in unused:
            value = getattr(args, f"disk_{name}")
            if value != _defaults()[f"disk_{name}"]:
                raise ValueError(f"disk_{name} {value} changes nothing without {needed}")


def _check_host(args: argparse.Namespace) -> None:
    if not args.kd_model_name:
        raise ValueError("DiSK needs a teacher: give --kd-model-name, got none")
    if args.kd_distill_type != "logit":
        raise ValueError(
            f"DiSK takes the place of --kd-distill-type logit, got {args.kd_distill_type}: drop the flag, or run "
            f"train.py itself for timm's own methods"
        )
    if "adahessian" in str(getattr(args, "opt", "")).lower():
        raise ValueError(f"DiSK has first-order gradients only, got --opt {args.opt}, which needs the second")
    for name, reason in INCOMPATIBLE.items():
        if getattr(args, name, False):
            raise ValueError(f"DiSK does not go with --{name.replace('_', '-')}: {reason}")


def task_arguments(args: argparse.Namespace, *, epochs: int) -> dict[str, Any]:
    """Turn the flags into keywords of ``DiSKTask``; ``epochs`` is the run's length."""
    budget = _budget(args.disk_budget)
    dual = {"budget": budget if len(budget) == 2 else budget[0]}
    for name in ("multiplier", "period", "budget_period", "budget_decay", "rule", "ascent_rate", "multiplier_cap"):
        dual[name] = getattr(args, f"disk_{name}")
    arguments = {
        "epochs": epochs if args.disk_epochs is None else args.disk_epochs,
        "mode": args.disk_mode,
        "guide": guide_of(args),
        "dual": dual,
        "allow_fresh_guide": args.disk_allow_fresh_guide,
        **_loss(args),
    }
    if args.disk_mode == "alternating":
        arguments["alternating"] = {name: getattr(args, f"disk_{name}") for name in _ALTERNATING}
    name = chosen_method(args)
    if name != "none":
        settings = {key: getattr(args, f"disk_{name}_{key}") for key in method_settings(name)}
        arguments |= {"method": name, "method_settings": settings, "weight": args.disk_feature_weight}
    return arguments


def _loss(args: argparse.Namespace) -> dict[str, Any]:
    names = ["discount", "top_k", "student_temperature", "variant", "guide_gradient_scale"]
    if args.disk_uniform:  # which has the discount
        names.remove("discount")
    return {**{name: getattr(args, f"disk_{name}") for name in names}, "budget": _budget(args.disk_budget)[0]}


def _budget(given: float | list[float] | None) -> list[Any]:
    """Return the budget as a list: one number or None, or upper and lower."""
    numbers: list[Any] = given if isinstance(given, list) else [given]
    if not 1 <= len(numbers) <= 2:
        raise ValueError(f"disk_budget must be one number, or upper and lower, got {given}")
    return numbers
