"""Resuming in timm's train.py, with warnings about settings that have changed since the checkpoint."""

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.utils import is_primary
from torch.optim import Optimizer

from . import flags
from .guided_task import GuidedTask
from .state import holds_guide
from .teacher_checkpoint import get_arguments, read

_logger = logging.getLogger("train")
# arguments of the host that its optimizer's state holds, and those that decide its parameter groups
_KEPT = ("lr", "momentum", "weight_decay", "opt_eps", "opt_betas", "opt_kwargs")
_GROUPS = ("weight_decay", "layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale")


def resume_task(resume: Callable[..., Any], args: argparse.Namespace, task: GuidedTask, path: str, **how: Any) -> Any:
    """Resume as the host does; warn of changed settings, and do not load the optimizer of a run without a guide.

    Raises:
        ValueError: another optimizer than the checkpoint's.
        RuntimeError: a checkpoint without DiSK's state, or of another mode.
    """
    checkpoint = read(path)
    before = get_arguments(checkpoint)
    without_guide = not holds_guide(checkpoint.get("task_state"))
    if without_guide and args.disk_allow_fresh_guide and task.recipe is None and how.get("optimizer") is not None:
        _logger.warning("The checkpoint's optimizer state is from a run without a guide: it is not restored.")
        how["optimizer"] = None
    optimizer = how.get("optimizer") if "optimizer" in checkpoint else None
    if optimizer is not None and not (without_guide and not args.disk_allow_fresh_guide):  # else resume raises
        _check_optimizer(optimizer, checkpoint["optimizer"], before, args)
    if is_primary(args):
        _tell(before, args, optimizer)
    return resume(task, path, **how)


def _changed(before: Mapping[str, Any], args: argparse.Namespace, names: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Return the arguments that both runs have and that differ, by name, with their values before and now."""
    both = {name: (before[name], getattr(args, name)) for name in names if name in before and hasattr(args, name)}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _tell(before: Mapping[str, Any], args: argparse.Namespace, optimizer: Optimizer | None) -> None:
    """Warn of settings that have changed, and of changes that the optimizer's state overrides."""
    for name, (was, now) in _changed(before, args, sorted(flags.names())).items():
        _logger.warning(f"Resumed with another {name}: {now}, was {was}")
    if optimizer is not None:
        for name, (was, now) in _changed(before, args, _KEPT).items():
            _logger.warning(
                f"Resumed with another {name}: {now}, but the optimizer's state brings {was} along "
                f"(--no-resume-opt takes the new one)"
            )
    if "epochs" in _changed(before, args, ["epochs"]) and args.disk_epochs is None:
        _logger.warning(
            f"Resumed with {args.epochs} epochs, was {before['epochs']}: multiplier and budget now follow the schedule "
            f"of {args.epochs} (--disk-epochs {before['epochs']} keeps it)"
        )


def _check_optimizer(
    optimizer: Optimizer, state: Mapping[str, Any], before: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Raise ValueError for a state with which torch would fail in the first step, or raise without a reason."""
    other = _changed(before, args, ["opt"])
    if other:
        was, now = other["opt"]
        raise ValueError(
            f"the checkpoint's optimizer is that of --opt {was}, got --opt {now}: give --opt {was}, or --no-resume-opt "
            f"to go on with a new {now}"
        )
    found, expected = len(state["param_groups"]), len(optimizer.param_groups)
    if found != expected:
        reasons = [f"{name} was {was}, is {now}" for name, (was, now) in _changed(before, args, _GROUPS).items()]
        raise ValueError(
            f"the checkpoint's optimizer must have this run's {expected} parameter groups, got {found}"
            f"{': ' if reasons else ''}{', '.join(reasons)}; --no-resume-opt goes on with a new optimizer"
        )
    # torch fills in flags that a later version has added
    needed = {
        name for name, default in optimizer.defaults.items() if default is not None and not isinstance(default, bool)
    }
    missing = sorted(name for name in needed if any(name not in group for group in state["param_groups"]))
    if missing:  # another kind, of a checkpoint without arguments
        raise ValueError(
            f"the checkpoint's optimizer must have the settings of {type(optimizer).__name__}, got one without "
            f"{missing}: it is of another kind; --no-resume-opt goes on with a new optimizer"
        )
