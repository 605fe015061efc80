"""One experiment: the merged configuration, the settings that define it, and its folder."""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from mdistiller.distillers import distiller_dict
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import CFG
from yacs.config import CfgNode

SETTINGS = "settings.yaml"
_NOT_DEFINING = ("SOLVER.EPOCHS",)  # may grow from run to run

Settings = dict[str, Any]


def merge(path: Path, options: list[str], *, distiller: str | None, seed: int | None) -> CfgNode:
    """Merge the host's and DiSK's defaults, a YAML file, ``KEY VALUE`` options and the flags, the last winning.

    Raises:
        ValueError: an unknown key (with those known), a value of another type, an option without a value.
    """
    if len(options) % 2:
        raise ValueError(f"options must be pairs KEY VALUE, got {len(options)} words: {' '.join(options)}")
    cfg = CFG.clone()
    try:
        with open(path) as file:
            content = yaml.safe_load(file) or {}
        if not isinstance(content, dict):
            raise ValueError(f"--cfg must be a YAML file of sections, got {type(content).__name__} in {path}")
        cfg.merge_from_other_cfg(CfgNode(_with_floats(content, cfg)))
        for key, value in zip(options[::2], options[1::2], strict=True):
            whole = value.lstrip("+-").isdigit() and isinstance(_node(cfg, key.split("."))[0], float)
            cfg.merge_from_list([key, f"{value}.0" if whole else value])
    except (KeyError, AssertionError, yaml.YAMLError) as error:
        raise ValueError(f"{error.args[0] if error.args else error}{_known_keys(cfg, str(error))}") from error
    if distiller is not None:
        if distiller != cfg.DISTILLER.TYPE or not cfg.EXPERIMENT.TAG:
            cfg.EXPERIMENT.TAG = ",".join([distiller.lower(), cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT])
        cfg.DISTILLER.TYPE = distiller
    if seed is not None:
        cfg.SOLVER.SEED = seed
    return cfg


def check_names(cfg: CfgNode, models: dict[str, Any]) -> None:
    """Refuse, listing those known, a name that the host's dictionaries do not have.

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
    if trainer == "disk" and kind not in ("DISK", "DISK_SIMKD"):
        raise ValueError(f"SOLVER.TRAINER disk needs DISTILLER.TYPE DISK or DISK_SIMKD, got {kind}")


def settings_of(cfg: CfgNode, *, teacher: str, warm_start: str) -> Settings:
    """Return by dotted key what makes a run what it is; where it logs and how its data is loaded does not.

    ``teacher`` and ``warm_start`` tell weights apart, whatever file they lie in.
    """
    kind = cfg.DISTILLER.TYPE
    sections = ["DISTILLER", "SOLVER", *([kind] if kind in cfg else []), *(["DISK"] if kind == "DISK_SIMKD" else [])]
    settings = {"DATASET.TYPE": cfg.DATASET.TYPE, "teacher weights": teacher}
    for section in sections:
        settings.update(_flat(section, cfg[section]))
    settings["DISTILLER.WARM_START"] = warm_start
    return settings


class Folder:
    """Where an experiment's checkpoints and logs lie: LOG.PREFIX/EXPERIMENT.PROJECT/NAME-HASH.

    The host puts every option into the folder's name, so that a changed one loses ``--resume``. Here the name is that
    of the experiment and a short hash of the settings that define it; the settings themselves lie inside.
    """

    def __init__(self, cfg: CfgNode, settings: Settings) -> None:
        self.settings = settings
        self._parent = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT)
        self._name = (cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG).replace(os.sep, "_")
        canonical = yaml.safe_dump(_defining(settings), sort_keys=True)
        self.path = self._parent / f"{self._name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"

    def start(self, *, overwrite: bool) -> None:
        """Begin a run.

        Raises:
            FileExistsError: the folder holds an earlier run, and ``overwrite`` is not set.
        """
        if self.path.is_dir() and any(entry.name != SETTINGS for entry in self.path.iterdir()):
            if not overwrite:
                raise FileExistsError(
                    f"{self.path} holds an earlier run: go on with it by --resume, or delete it and start anew by "
                    f"--overwrite"
                )
            shutil.rmtree(self.path)
        self._write()

    def resume(self, *, allow_changed_settings: bool) -> None:
        """Go on with an earlier run: see :meth:`find`."""
        before = self.find("--resume", allow_changed_settings=allow_changed_settings)
        epochs, now = before.get("SOLVER.EPOCHS"), self.settings["SOLVER.EPOCHS"]
        if epochs != now and self.settings.get("DISK.DUAL.EPOCHS", now) is None:
            print(  # noqa: T201
                f"SOLVER.EPOCHS was {epochs} and is {now}: from here multiplier and budget follow the schedule of {now}"
                f" epochs (DISK.DUAL.EPOCHS sets its length apart)"
            )
        self._write()

    def find(self, flag: str, *, allow_changed_settings: bool) -> Settings:
        """Turn to the run with these settings, or the latest of the name if others are allowed; return the run's.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it had other settings; the message lists them.
        """
        runs = self._runs()
        for path, settings in runs:
            if _defining(settings) == _defining(self.settings):
                self.path = path
                return settings
        if not runs:
            raise FileNotFoundError(
                f"{flag} needs an earlier run with a checkpoint 'latest' in {self.path}, found none: start it without "
                f"{flag}, or with --overwrite if it ended before its first checkpoint"
            )
        self.path, settings = runs[0]
        differences = _differences(_defining(settings), _defining(self.settings))
        if not allow_changed_settings:
            raise ValueError(
                f"{flag} found {self.path}, whose settings differ:\n{differences}\nGive it the settings it had, start "
                f"another run without {flag}, or go on with the new ones by --allow-changed-settings"
            )
        print(f"going on with {self.path} under changed settings:\n{differences}")  # noqa: T201
        return settings

    def _runs(self) -> list[tuple[Path, Settings]]:
        """Runs of this name that have a checkpoint, the latest first."""
        pattern = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in self._name)
        found = [path for path in self._parent.glob(f"{pattern}-{'[0-9a-f]' * 8}") if (path / "latest").is_file()]
        found = [path for path in found if (path / SETTINGS).is_file()]
        found.sort(key=lambda path: (path / "latest").stat().st_mtime, reverse=True)
        return [(path, yaml.safe_load((path / SETTINGS).read_text())) for path in found]

    def _write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{SETTINGS}.partial"
        partial.write_text(yaml.safe_dump(self.settings, sort_keys=True))
        partial.replace(self.path / SETTINGS)


def _defining(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key not in _NOT_DEFINING}


def dump(cfg: CfgNode, folder: Folder, path: Path) -> None:
    """Write the merged configuration for the host, so that its own naming gives ``folder``."""
    cfg = cfg.clone()
    cfg.EXPERIMENT.NAME = folder.path.name
    path.write_text(cfg.dump())


def _differences(before: Settings, now: Settings) -> str:
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key, "-") != now.get(key, "-"))
    return "\n".join(f"  {key}: {before.get(key, 'not set')} then, {now.get(key, 'not set')} now" for key in keys)


def _flat(prefix: str, node: CfgNode) -> Settings:
    settings: Settings = {}
    for key, value in node.items():
        name = f"{prefix}.{key}"
        if isinstance(value, CfgNode):
            settings.update(_flat(name, value))
        else:
            settings[name] = list(value) if isinstance(value, tuple) else value
    return settings


def _with_floats(content: dict[str, Any], defaults: CfgNode) -> dict[str, Any]:
    """Turn whole numbers into floats where the default is one: yacs refuses 1 for 1.0."""
    converted = {}
    for key, value in content.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, CfgNode):
            value = _with_floats(value, default)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        converted[key] = value
    return converted


def _node(cfg: CfgNode, names: list[str]) -> tuple[Any, list[str]]:
    """Follow dotted names as far as they exist; return what is there and the names followed."""
    followed: list[str] = []
    node: Any = cfg
    for name in names:
        if not isinstance(node, CfgNode) or name not in node:
            break
        node = node[name]
        followed.append(name)
    return node, followed


def _known_keys(cfg: CfgNode, message: str) -> str:
    found = re.search(r"key: ([\w.]+)", message)
    if not found:
        return ""
    node, followed = _node(cfg, found.group(1).split("."))
    keys = sorted(node) if isinstance(node, CfgNode) else []
    return f"; known in {'.'.join(followed) or 'the configuration'}: {', '.join(keys)}" if keys else ""
