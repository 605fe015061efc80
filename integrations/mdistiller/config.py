"""The keys that DiSK adds to the host's configuration, and their translation into DiSK's constructors.

A key is an argument's name in upper case; defaults are those of the signatures and of the paper's recipe.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import CFG
from yacs.config import CfgNode

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, _checks
from disk_plugin._form import has_budget
from disk_plugin._watch import ignoring_note
from disk_plugin.features import METHODS, Guided, Method
from disk_plugin.features.launching import settings_of
from disk_plugin.presets import PAPER
from disk_plugin.replay import GuideReplay
from disk_plugin.uniform import UniformGuide

_READ = (
    *("EXPERIMENT.PROJECT", "EXPERIMENT.NAME", "EXPERIMENT.TAG", "DATASET.TYPE"),
    *("DISTILLER.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT"),
    *("SOLVER.TRAINER", "SOLVER.BATCH_SIZE", "SOLVER.EPOCHS", "SOLVER.LR", "LOG.PREFIX"),
)


def add_defaults() -> None:
    """Add the sections and keys to the host's ``CFG``; what is there already stays."""
    _check_keys()
    for name, kind in METHODS.items():
        _add_method(name.upper(), kind)
    if "DISK" in CFG:
        return
    recipe = PAPER["recipe"]
    # the scheduler sets the multiplier of a budget: two equal bounds keep it constant
    CFG.DISK = _section(DiSKLoss, without=("multiplier", "weight"))
    CFG.DISK.UNIFORM = False  # one g for all samples, UniformGuide(discount=DISK.DISCOUNT): the control of every guide
    CFG.DISK.GUIDE = _section(GuideHead)
    CFG.DISK.GUIDE.USE_FEATURES = True  # the teacher's pooled features, beside its logits
    CFG.DISK.DUAL = _section(DualScheduler)
    # length of the schedules, in epochs or in outer iterations of Algorithm 1; None for the run's
    CFG.DISK.DUAL.EPOCHS = None
    CFG.DISK.ALTERNATING = CfgNode()  # SOLVER.TRAINER "disk"
    CFG.DISK.ALTERNATING.GUIDE_PASSES = recipe["guide_passes"]  # before each group of student passes
    CFG.DISK.ALTERNATING.STUDENT_PASSES = recipe["student_passes"]  # epochs of the host
    CFG.DISK.ALTERNATING.GUIDE_WARMUP_EPOCHS = 0  # guide passes before anything else
    CFG.DISK.ALTERNATING.OPTIMIZER = "SGD"  # of the guide: SGD or Adam
    CFG.DISK.ALTERNATING.LR = recipe["lr"]  # decays by the factor of the student's
    CFG.DISK.ALTERNATING.MOMENTUM = recipe["momentum"]  # of SGD
    CFG.DISK.ALTERNATING.WEIGHT_DECAY = recipe["weight_decay"]
    CFG.DISK.ALTERNATING.REPLAY = False  # guide passes after the first iteration's are on a record, not over the loader
    capacity = inspect.signature(GuideReplay).parameters["capacity"].default
    CFG.DISK.ALTERNATING.REPLAY_CAPACITY = capacity  # samples that the record holds at most
    CFG.DATASET.HELD_OUT = 0.0  # share of the training images that no run with this share sees, whatever its seed
    CFG.DISTILLER.WARM_START = ""  # checkpoint of a CE-trained student, for any distiller
    CFG.SOLVER.SEED = CFG.SOLVER.get("SEED")  # seeds initial weights and every epoch, for any distiller and trainer
    CFG.LOG.WANDB = False


def _check_keys() -> None:
    """Validate that a fork's configuration still has the keys that this adapter reads.

    Raises:
        ImportError: it lacks some, or has a section of the name of ours.
    """
    lacking = [key for key in _READ if not has_key(CFG, key)]
    if lacking:
        raise ImportError(
            f"the host's mdistiller/engine/cfg.py must have the keys {', '.join(_READ)}; it lacks {lacking}"
        )
    if "DISK" in CFG and not has_key(CFG, "DISK.ALTERNATING.REPLAY_CAPACITY"):
        raise ImportError("the host's mdistiller/engine/cfg.py has a section DISK of its own")


def has_key(cfg: CfgNode, key: str) -> bool:
    """Return whether a configuration has a dotted key."""
    node: Any = cfg
    for name in key.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            return False
        node = node[name]
    return True


def _add_method(section: str, kind: type[Method]) -> None:
    """Add a method's two sections: by itself, and weighted by the guide, whose settings are the section ``DISK``."""
    settings = {key.upper(): value for key, value in settings_of(kind).items()}
    if "CE_WEIGHT" not in settings and not kind.own_prediction:
        settings["CE_WEIGHT"] = 1.0  # a method without a cross-entropy would not train the logits
    if section not in CFG:
        CFG[section] = CfgNode({**settings, kind.weight_name.upper(): 1.0})
    if f"DISK_{section}" not in CFG:
        guided = settings_of(Guided)
        guided[kind.weight_name] = guided.pop("method_weight")
        guided["logit_loss"] = bool(kind.scaffolded)
        CFG[f"DISK_{section}"] = CfgNode({**{key.upper(): value for key, value in guided.items()}, **settings})


def method_settings(cfg: CfgNode, section: str, kind: type[Method]) -> dict[str, Any]:
    """Return a method's own settings from one of its sections."""
    return {key: cfg[section][key.upper()] for key in settings_of(kind)}


def ce_weight(cfg: CfgNode, section: str, kind: type[Method]) -> float:
    """Return the weight of the cross-entropy added to a method without one; ValueError if it is negative."""
    weight = 0.0 if "ce_weight" in settings_of(kind) else float(cfg[section].get("CE_WEIGHT", 0.0))
    _checks.number(f"{section}.CE_WEIGHT", weight, at_least=0)
    return weight


def loss_weight(cfg: CfgNode, section: str, kind: type[Method]) -> float:
    """Return the weight of a method's losses.

    Raises:
        ValueError: it is negative.
    """
    key = kind.weight_name.upper()
    _checks.number(f"{section}.{key}", cfg[section][key], at_least=0)
    return float(cfg[section][key])


def weighing(cfg: CfgNode, section: str, kind: type[Method]) -> dict[str, Any]:
    """Return the keywords of ``Guided`` from a method's guided section."""
    node = cfg[section]
    return {"weight": node.WEIGHT, "method_weight": loss_weight(cfg, section, kind), "logit_loss": node.LOGIT_LOSS}


def check_imported(methods: dict[str, type[Method]]) -> None:
    """Validate that the user's own methods have no name that the host uses.

    Raises:
        ValueError: one does.
    """
    for name, kind in methods.items():
        if name.upper() in CFG or name.upper() in distiller_dict:
            raise ValueError(f"--import: rename {kind.__name__}, as the host has a {name.upper()} already")


def build_loss(cfg: CfgNode, num_classes: int, feature_dim: int) -> DiSKLoss:
    """Turn ``cfg.DISK`` into a loss and its guide."""
    guide = _arguments(cfg.DISK.GUIDE)
    feature_dim = feature_dim if guide.pop("use_features") else 0
    loss = _arguments(cfg.DISK)
    uniform = loss.pop("uniform")
    if is_number(loss["discount"]):
        loss["discount"] = float(loss["discount"])  # a word in the configuration, which has one type per key
    if uniform:
        _check_uniform(cfg)
        return DiSKLoss(UniformGuide(discount=loss.pop("discount")), **loss)
    return DiSKLoss(GuideHead(num_classes, feature_dim, **guide), **loss)


def follows_discount(cfg: CfgNode) -> bool:
    """Return whether the loss has a discount: no setting of it or of its schedule asks for a budget."""
    disk, dual = cfg.DISK, cfg.DISK.DUAL
    asked = (disk.BUDGET, dual.MULTIPLIER, dual.PERIOD, dual.BUDGET, dual.BUDGET_PERIOD)
    return disk.DISCOUNT is not None and all(value is None for value in asked) and dual.RULE == "cosine"


def _check_uniform(cfg: CfgNode) -> None:
    if not follows_discount(cfg):
        raise ValueError("DISK.UNIFORM True follows DISK.DISCOUNT, auto or a number: leave out what asks for a budget")
    if cfg.SOLVER.TRAINER == "disk":
        raise ValueError("DISK.UNIFORM True has no guide that Algorithm 1 could train: leave out SOLVER.TRAINER disk")


def build_dual(cfg: CfgNode, loss: DiSKLoss, epochs_per_iteration: int) -> DualScheduler:
    """Turn ``cfg.DISK.DUAL`` into a schedule, with a step per ``epochs_per_iteration`` epochs of the host."""
    dual = _arguments(cfg.DISK.DUAL)
    if dual["epochs"] is None:
        dual["epochs"] = math.ceil(cfg.SOLVER.EPOCHS / epochs_per_iteration)
    if dual["budget"] is None and has_budget(loss):
        dual["budget"] = loss.budget.item()  # given, so that a checkpoint's does not override a changed one
    with ignoring_note():  # the launcher prints the note
        return DualScheduler(loss, **dual)


def is_number(text: Any) -> bool:
    """Return whether a string of the configuration is a number."""
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


def _section(target: Callable[..., Any], *, without: tuple[str, ...] = ()) -> CfgNode:
    """Return a section with one key per keyword-only argument that has a default."""
    section = CfgNode()
    for name, parameter in inspect.signature(target).parameters.items():
        if name in without or parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.default is not parameter.empty:
            section[name.upper()] = (
                list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            )
    return section


def _arguments(section: CfgNode) -> dict[str, Any]:
    return {
        key.lower(): tuple(value) if isinstance(value, list) else value
        for key, value in section.items()
        if not isinstance(value, CfgNode)
    }
