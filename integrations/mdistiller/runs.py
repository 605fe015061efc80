"""Earlier runs of an experiment: what each was made with, and how that differs from the settings of now."""

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
_MARK = {"recorded": "the whole configuration"}  # earlier versions recorded DISTILLER, SOLVER and the distiller's own
# what those versions did where there was no such key yet
_BEFORE = {"DISK.ALTERNATING.REPLAY": False, FORM: "budget"}


# what a checkpoint holds, its shapes depend on or its whole course does: no flag makes a resumed run change it
_LASTING = re.compile(
    r"DISTILLER\.|DATASET\.|teacher weights|what bounds g$|SOLVER\.(TRAINER|TYPE|SEED)"
    r"|DISK\.(GUIDE\.|STUDENT_TEMPERATURE)|DISK\.ALTERNATING\.(OPTIMIZER|REPLAY(_CAPACITY)?$|STUDENT_PASSES)"
)


@dataclass(frozen=True)
class Run:
    """An earlier run beside the settings of now.

    Attributes:
        path: its folder.
        settings: what it was made with, by dotted key; what it did not record as it is now.
        differences: a line for each key that defines a run and whose value differs.
        whole: whether it recorded its whole configuration and the contents of its data.
        unknown: the keys that it did not record and that are not at their defaults now.
    """

    path: Path
    settings: Settings
    differences: dict[str, str]
    whole: bool
    unknown: tuple[str, ...]

    @property
    def distance(self) -> tuple[int, int]:
        """How many settings differ, and how many may."""
        return len(self.differences), len(self.unknown)


def defining(settings: Settings) -> Settings:
    """Return the settings that tell one run from another: all but those that may change from start to start."""
    return {key: value for key, value in settings.items() if key not in _MAY_GROW}


def lasts(key: str) -> bool:
    """Whether no resumed run may change a setting."""
    shapes = {f"{name}.{each}".upper() for name, kind in METHODS.items() for each in kind.shape_settings}
    return bool(_LASTING.match(key)) or key.removeprefix("DISK_") in shapes


def write_settings(folder: Path, settings: Settings) -> None:
    """Record the settings of a run, at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{SETTINGS}.partial"
    partial.write_text(yaml.safe_dump(settings | _MARK, sort_keys=True))
    partial.replace(folder / SETTINGS)


def read_runs(folders: Iterable[Path], now: Settings, *, ignore: tuple[str, ...] = ()) -> list[Run]:
    """Read the runs among these folders that have a checkpoint and compare them, but for the keys in ``ignore``.

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
    """Say which runs ``flag`` found, how each differs from the settings of now, and several from each other."""
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
    """Compare what a run recorded; what it did not is no difference, but may be unknown."""
    defaults = default_settings()
    whole = all(recorded.get(key) == value for key, value in _MARK.items())
    then = {key: value for key, value in recorded.items() if key not in _MARK}
    absent = now.keys() - then.keys()
    if whole:  # there was no such key: a default leaves the training as it was
        then.update({key: defaults[key] for key in absent & defaults.keys()})
        then.setdefault(FORM, _BEFORE[FORM])
        unknown: list[str] = []
    else:
        then.update({key: _BEFORE.get(key, now[key]) for key in absent})
        unknown = [key for key in sorted(absent) if key not in _BEFORE and now[key] != defaults.get(key)]
        if now["data"].startswith(f"{then['data']},"):  # it recorded sizes alone
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
