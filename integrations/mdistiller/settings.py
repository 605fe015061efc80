"""The settings of an experiment: the merged configuration, and the part of it that defines a run."""

import re
from pathlib import Path
from typing import Any

import yaml
from mdistiller.distillers import distiller_dict
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import CFG
from yacs.config import CfgNode

from .complete_trainer import CompleteTrainer
from .config import follows_discount, is_number
from .distillers import GuidedDistiller
from .method_distiller import MethodDistiller

Settings = dict[str, Any]
FORM = "what bounds g"
# names, and how data is loaded and tested, which do not change the training
_NOT_DEFINING = {
    "EXPERIMENT.NAME",
    "EXPERIMENT.TAG",
    "EXPERIMENT.PROJECT",
    "DATASET.NUM_WORKERS",
    "DATASET.TEST.BATCH_SIZE",
}


def merge(path: Path, options: list[str], *, distiller: str | None, seed: int | None) -> CfgNode:
    """Merge the host's and DiSK's defaults, a YAML file, ``KEY VALUE`` options and the flags; later ones win.

    Raises:
        ValueError: an unknown key (with those known), a value of another type, an option without a value.
    """
    if len(options) % 2:
        raise ValueError(f"options must be pairs KEY VALUE, got {len(options)} words: {' '.join(options)}")
    cfg, key = CFG.clone(), f"--cfg {path}"
    try:
        cfg.merge_from_other_cfg(CfgNode(_with_floats(_read(path), cfg)))
        of_the_file = cfg.DISTILLER.clone()
        for key, value in zip(options[::2], options[1::2], strict=True):
            default = _node(cfg, key.split("."))[0]
            if default == "auto" and is_number(value):
                value = f"'{value}'"  # yacs raises for a number in place of a string
            whole = value.lstrip("+-").isdigit() and isinstance(default, float)
            cfg.merge_from_list([key, f"{value}.0" if whole else value])
    except (KeyError, AssertionError, yaml.YAMLError) as error:
        raise ValueError(f"{error.args[0] if error.args else error}{_known_keys(cfg, str(error))}") from error
    except TypeError as error:  # a key below one that is not a section, or one that is not a string
        raise ValueError(f"{key} must name keys of the configuration: {error}") from error
    except ValueError as error:
        raise ValueError(_expected(cfg, str(error))) from error
    if distiller is not None:
        cfg.DISTILLER.TYPE = distiller
    bounds = cfg.DISK.DUAL.MULTIPLIER
    if bounds is not None and not isinstance(bounds, list | tuple):
        hint = f": '[{bounds}, {bounds}]' keeps it constant" if isinstance(bounds, int | float) else ""
        raise ValueError(f"DISK.DUAL.MULTIPLIER must be two numbers such as [0.1, 50.0], got {bounds}{hint}")
    if seed is not None:
        cfg.SOLVER.SEED = seed
    if cfg.SOLVER.SEED is not None and not isinstance(cfg.SOLVER.SEED, int):
        raise ValueError(f"SOLVER.SEED must be an int, got {cfg.SOLVER.SEED!r}")
    if cfg.DISTILLER.TYPE == "CRD":  # its batches hold negative samples, which the other trainers do not accept
        cfg.SOLVER.TRAINER = {"base": "crd", "dot": "crd_dot"}.get(cfg.SOLVER.TRAINER, cfg.SOLVER.TRAINER)
    named = ("TYPE", "TEACHER", "STUDENT")
    if any(cfg.DISTILLER[key] != of_the_file[key] for key in named) and "EXPERIMENT.TAG" not in options[::2]:
        cfg.EXPERIMENT.TAG = ",".join([cfg.DISTILLER.TYPE.lower(), cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT])
    return cfg


def check_names(cfg: CfgNode, models: dict[str, Any]) -> None:
    """Raise ValueError, listing the known names, if the host's dictionaries lack one.

    Raises:
        ValueError: an unknown distiller, trainer, teacher or student; a trainer that does not fit the distiller.
    """
    kind, trainer = cfg.DISTILLER.TYPE, cfg.SOLVER.TRAINER
    chosen = [
        ("DISTILLER.TYPE", kind, distiller_dict),
        ("SOLVER.TRAINER", trainer, trainer_dict),
        ("DISTILLER.STUDENT", cfg.DISTILLER.STUDENT, models),
        *([] if kind == "NONE" else [("DISTILLER.TEACHER", cfg.DISTILLER.TEACHER, models)]),
    ]
    for key, name, known in chosen:
        if name not in known:
            raise ValueError(f"{key} must be one of {', '.join(sorted(known))}, got {name!r}")
    if trainer == "disk" and not is_guided(cfg):
        guided = [name for name, each in distiller_dict.items() if _is_guided(each)]
        raise ValueError(f"SOLVER.TRAINER disk needs DISTILLER.TYPE {' or '.join(guided)}, got {kind}")
    if _is_own(distiller_dict[kind]) and cfg.EXPERIMENT.get("LOGIT_STAND"):
        raise ValueError(f"EXPERIMENT.LOGIT_STAND True is for this checkout's own distillers, {kind} does not read it")
    if (cfg.SOLVER.SEED is not None or cfg.DISTILLER.WARM_START or _is_guided(distiller_dict[kind])) and not (
        isinstance(trainer_dict[trainer], type) and issubclass(trainer_dict[trainer], CompleteTrainer)
    ):
        raise ValueError(
            f"SOLVER.SEED, DISTILLER.WARM_START and a guide need a SOLVER.TRAINER that is a BaseTrainer of the host, "
            f"got {trainer!r}, which is none"
        )
    if trainer in ("crd", "crd_dot") and kind != "CRD":
        raise ValueError(f"SOLVER.TRAINER {trainer} needs DISTILLER.TYPE CRD, got {kind}")


def get_settings(cfg: CfgNode, *, data: str, teacher: str, warm_start: str) -> Settings:
    """Return the settings that define a run, by dotted key: the configuration except for keys without effect.

    Sections of other methods are included, as a user's own method may read them. ``data``, ``teacher`` and
    ``warm_start`` are fingerprints of data and weights, independent of their paths.
    """
    return {
        **{
            key: value
            for key, value in _flat("", cfg).items()
            if key not in _NOT_DEFINING and not key.startswith("LOG.")
        },
        FORM: "discount" if follows_discount(cfg) else "budget",
        "data": data,
        "teacher weights": teacher,
        "DISTILLER.WARM_START": warm_start,
    }


def default_settings() -> Settings:
    """Return the defaults of host and DiSK by dotted key."""
    return _flat("", CFG)


def is_guided(cfg: CfgNode) -> bool:
    """Return whether the distiller has a guide, and so a multiplier and a budget."""
    return _is_guided(distiller_dict[cfg.DISTILLER.TYPE])


def _is_own(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, GuidedDistiller | MethodDistiller)


def _is_guided(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, GuidedDistiller)


def dump(cfg: CfgNode, name: str, path: Path) -> None:
    """Write the merged configuration for the host, so that its naming yields the folder ``name``."""
    cfg = cfg.clone()
    cfg.EXPERIMENT.NAME = name
    _quote(cfg)
    path.write_text(cfg.dump())


def _quote(node: CfgNode) -> None:
    """Quote words that yacs would read as something else, such as the discount '0.4'."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            _quote(value)
        elif isinstance(value, str) and not isinstance(CfgNode._decode_cfg_value(value), str):
            node[key] = repr(value)


def _flat(prefix: str, node: CfgNode) -> Settings:
    settings: Settings = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            settings.update(_flat(f"{prefix}{key}.", value))
        else:
            settings[f"{prefix}{key}"] = _plain(value)
    return settings


def _plain(value: Any) -> Any:
    """Convert tuples to lists, which a YAML file restores."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text()) or {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"--cfg must be a YAML file of named sections, got {content!r:.60} in {path}")
    return content


def _with_floats(content: dict[str, Any], defaults: CfgNode) -> dict[str, Any]:
    """Convert integers to floats if the default is one, and numbers to strings likewise: yacs raises on 1 for 1.0."""
    converted = {}
    for key, value in content.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, CfgNode):
            value = _with_floats(value, default)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(default, float):
                value = float(value)
            elif default == "auto":
                value = str(value)
        converted[key] = value
    return converted


def _node(cfg: CfgNode, names: list[str]) -> tuple[Any, list[str]]:
    """Follow dotted names as far as they exist; return the node and the names followed."""
    followed: list[str] = []
    node: Any = cfg
    for name in names:
        if not isinstance(node, CfgNode) or name not in node:
            break
        node = node[name]
        followed.append(name)
    return node, followed


def _expected(cfg: CfgNode, message: str) -> str:
    """Return the message for a value of a wrong type, with what was expected and how to write it."""
    found = re.search(r"with values \(.*\) for config key: (\S+)$", message, re.DOTALL)
    if found is None:
        return message
    key = found.group(1)
    default = _node(cfg, key.split("."))[0]
    got = message[found.start() : found.start(1)].removeprefix(f"with values ({default} vs. ")
    got = got.removesuffix(") for config key: ")
    if isinstance(default, CfgNode):
        return f"{key} must name a key, not a section{_known_keys(cfg, f'key: {key}')}"
    kinds: dict[type, str] = {list: "a list", tuple: "a list", int: "a whole number", float: "a number", str: "a word"}
    kind, hint = kinds.get(type(default), f"a {type(default).__name__}"), ""
    if isinstance(default, str):
        hint = f""": '"{got}"' makes it one"""
    elif isinstance(default, list | tuple) and re.fullmatch(r"[-+.\de]+", got):
        hint = f": '[{got}]' makes it one"
    return f"{key} must be {kind}{f' such as {default!r}' if default != '' else ''}, got {got}{hint}"


def _known_keys(cfg: CfgNode, message: str) -> str:
    found = re.search(r"key: ([\w.]+)", message)
    if not found:
        return ""
    node, followed = _node(cfg, found.group(1).split("."))
    keys = sorted(node) if isinstance(node, CfgNode) else []
    return f"; known in {'.'.join(followed) or 'the configuration'}: {', '.join(keys)}" if keys else ""
