"""The files of an epoch, committed atomically even if a run is killed."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mdistiller.engine import trainer as host

from .checkpoints import load_file, write

Saves = list[tuple[Any, str]]  # contents and the files they are for

_COMMITTED, _WORKLOG, _LOGGED = "latest", "worklog.txt", "worklog_bytes"


@contextmanager
def collected() -> Iterator[Saves]:
    """Collect what the host's trainers save instead of writing it."""
    saves: Saves = []
    save, host.save_checkpoint = host.save_checkpoint, lambda content, path: saves.append((content, path))
    try:
        yield saves
    finally:
        host.save_checkpoint = save


def commit(saves: Saves, folder: str, epoch: int) -> None:
    """Commit an epoch's files: write them beside the current ones, then rename them, ``latest`` first.

    A run killed before ``latest`` is renamed repeats the epoch when it is resumed; one killed later has its commit
    completed by ``finalize``. ``latest`` also holds the length of the log up to its epoch.
    """
    saves = sorted(saves, key=lambda save: Path(save[1]).name != _COMMITTED)
    worklog = Path(folder, _WORKLOG)
    for content, path in saves:
        if isinstance(content, dict) and "epoch" in content and worklog.is_file():
            content = {**content, _LOGGED: worklog.stat().st_size}
        write(content, _staged(path, epoch))
    for _, path in saves:
        os.replace(_staged(path, epoch), path)


def finalize(folder: str) -> None:
    """Finalize the files of a run that may have been killed: commit or roll back to the epoch of ``latest``."""
    state = load_file(str(Path(folder, _COMMITTED)), key="--resume")
    for path in Path(folder).iterdir():
        staged = re.fullmatch(r"(.+)\.(\d+)\.partial", path.name)
        if staged and int(staged[2]) == state["epoch"]:
            path.replace(path.with_name(staged[1]))
        elif staged:
            path.unlink()
    worklog = Path(folder, _WORKLOG)
    if worklog.is_file() and worklog.stat().st_size > state.get(_LOGGED, float("inf")):
        os.truncate(worklog, state[_LOGGED])  # of an epoch that is repeated, or the end of a run that is extended


def current_file(path: Path) -> Path:
    """Return the path with a file's current content: the staged one if the run was killed during a commit."""
    committed = path.with_name(_COMMITTED)
    staged = list(path.parent.glob(f"{path.name}.*.partial")) if committed.is_file() else []
    if not staged:
        return path
    epoch = load_file(str(committed), key="--evaluate")["epoch"]
    return next((each for each in staged if str(each) == _staged(str(path), epoch)), path)


def _staged(path: str, epoch: int) -> str:
    return f"{path}.{epoch}.partial"
