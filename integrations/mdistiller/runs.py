"""Earlier runs of an experiment: their settings, and how these differ from the current ones."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from disk_plugin.features import METHODS

from .settings import FORM, Settings, default_settings

SETTINGS = "settings.yaml"
CHECKPOINT = "latest"
_MAY_GROW = ("SOLVER.EPOCHS",)
_MARK = {"recorded": "the whole configuration"}  # earlier versions: DISTILLER, SOLVER, the distiller's own section
_GONE = ".GUIDE_LOGITS"  # a key of earlier versions without effect
# what earlier versions did before these keys existed
_BEFORE = {"DISK.ALTERNATING.REPLAY": False, FORM: "budget"}


# a checkpoint's content or shapes, or the whole run, depend on these: they never change on resume
_LASTING = re.compile(
    r"DISTILLER\.|DATASET\.|EXPERIMENT\.|teacher weights|what bounds g$|SOLVER\.(TRAINER|TYPE|SEED)"
    r"|DISK\.(GUIDE\.|UNIFORM|STUDENT_TEMPERATURE)|DISK\.ALTERNATING\.(OPTIMIZER|REPLAY(_CAPACITY)?$|STUDENT_PASSES)"
)


@dataclass(frozen=True)
class Run:
    """An earlier run compared with the current settings.

    Attributes:
        path: its folder.
        settings: by dotted key; keys that it did not record have the current value.
        differences: a line for each defining key whose value differs.
        whole: whether it recorded its whole configuration and the contents of its data.
        unknown: keys that it did not record and whose current value is not the default.
    """

    path: Path
    settings: Settings
    differences: dict[str, str]
    whole: bool
    unknown: tuple[str, ...]

    @property
    def distance(self) -> tuple[int, int]:
        """Number of settings that differ, and of those that may differ."""
        return len(self.differences), len(self.unknown)


def defining(settings: Settings) -> Settings:
    """Return the settings that define a run: all but those that may change on resume."""
    return {key: value for key, value in settings.items() if key not in _MAY_GROW}


def lasts(key: str) -> bool:
    """Return whether a setting can never change on resume."""
    shapes = {f"{name}.{each}".upper() for name, kind in METHODS.items() for each in kind.shape_settings}
    return bool(_LASTING.match(key)) or key.removeprefix("DISK_") in shapes


def write_settings(folder: Path, settings: Settings) -> None:
    """Write the settings of a run, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{SETTINGS}.partial"
    partial.write_text(yaml.safe_dump(settings | _MARK, sort_keys=True))
    partial.replace(folder / SETTINGS)


def read_runs(folders: Iterable[Path], now: Settings, *, ignore: tuple[str, ...] = ()) -> list[Run]:
    """Read the runs among these folders that have a checkpoint and compare them, except for the keys in ``ignore``.

    Raises:
        ValueError: a folder's settings cannot be read.
    """
    runs = []
    for folder in sorted(folders):
        if not (folder / CHECKPOINT).is_file() or not (folder / SETTINGS).is_file():
            continue
        try:
            recorded = yaml.safe_load((folder / SETTINGS).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{folder / SETTINGS} must be YAML, got {str(error).splitlines()[0]}") from error
        if not isinstance(recorded, dict):
            raise ValueError(f"{folder / SETTINGS} must hold settings, got {recorded!r:.60}")
        runs.append(_compare(folder, recorded, now, ignore))
    return runs


def nearest(runs: list[Run]) -> list[Run]:
    """Return the run with the fewest differences, or those that are equally near."""
    least = min(run.distance for run in runs)
    return [run for run in runs if run.distance == least]


def describe(flag: str, runs: list[Run]) -> str:
    """Describe the runs that ``flag`` found: how each differs from the current settings, and from each other."""
    if len(runs) == 1:
        return "\n".join([f"{flag} found {runs[0].path}, whose settings differ:", *runs[0].differences.values()])
    lines = [f"{flag} found {len(runs)} runs that are equally near:"]
    for run in runs:
        lines += [f"{run.path}{', whose settings differ:' if run.differences else ''}", *run.differences.values()]
    keys = sorted(set().union(*(run.settings for run in runs)))
    values = {key: [run.settings.get(key, "not set") for run in runs] for key in keys}
    apart = [f"  {key}: {', '.join(map(str, row))}" for key, row in values.items() if any(v != row[0] for v in row)]
    return "\n".join([*lines, *(["In this order they have", *apart] if apart else ["Their settings are the same"])])


def _compare(folder: Path, recorded: Settings, now: Settings, ignore: tuple[str, ...]) -> Run:
    """Compare a run's recorded settings with the current ones; what it did not record is no difference."""
    defaults = default_settings()
    whole = all(recorded.get(key) == value for key, value in _MARK.items())
    sections = {key.split(".")[0] for key in now}
    then = {
        key: value
        for key, value in recorded.items()
        # a section that does not exist now belongs to a method that was imported then, but not trained
        if key not in _MARK and not key.endswith(_GONE) and key.split(".")[0] in sections
    }
    absent = now.keys() - then.keys()
    if whole:  # the key did not exist: its default does not change the training
        then.update({key: defaults[key] for key in absent & defaults.keys()})
        then.setdefault(FORM, _BEFORE[FORM])
        unknown: list[str] = []
    else:
        then.update({key: _BEFORE.get(key, now[key]) for key in absent})
        unknown = [key for key in sorted(absent) if key not in _BEFORE and now[key] != defaults.get(key)]
        if now["data"].startswith(f"{then['data']},"):  # only sizes were recorded
            then["data"] = now["data"]
    return Run(folder, then, _differences(then, now, ignore), whole, tuple(unknown))


def _differences(then: Settings, now: Settings, ignore: tuple[str, ...]) -> dict[str, str]:
    before, after = defining(then), defining(now)
    pairs: dict[str, tuple[Any, Any]] = {
        key: (before.get(key, "not set"), after.get(key, "not set"))
        for key in sorted(before.keys() | after.keys())
        if key not in ignore
    }
    return {key: f"  {key}: {old} then, {new} now" for key, (old, new) in pairs.items() if old != new}
