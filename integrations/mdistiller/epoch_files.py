"""The files of an epoch: they change together, wherever a run is killed."""

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
    """Write an epoch's files beside those in force, then put them in their places, ``latest`` first.

    Until ``latest`` is in its place the epoch has not been, and a resumed run makes it again; from then on
    :func:`settle` has all that is missing. ``latest`` also tells how much of the log belongs to it.
    """
    saves = sorted(saves, key=lambda save: Path(save[1]).name != _COMMITTED)
    worklog = Path(folder, _WORKLOG)
    for content, path in saves:
        if isinstance(content, dict) and "epoch" in content and worklog.is_file():
            content = {**content, _LOGGED: worklog.stat().st_size}
        write(content, _staged(path, epoch))
    for _, path in saves:
        os.replace(_staged(path, epoch), path)


def settle(folder: str) -> None:
    """Bring the files of a run that may have been killed to the state that ``latest`` tells, before it goes on."""
    state = load_file(str(Path(folder, _COMMITTED)), key="--resume")
    for path in Path(folder).iterdir():
        staged = re.fullmatch(r"(.+)\.(\d+)\.partial", path.name)
        if staged and int(staged[2]) == state["epoch"]:
            path.replace(path.with_name(staged[1]))
        elif staged:
            path.unlink()
    worklog = Path(folder, _WORKLOG)
    if worklog.is_file() and worklog.stat().st_size > state.get(_LOGGED, float("inf")):
        os.truncate(worklog, state[_LOGGED])  # an epoch that is made again, or the end of a run that goes on


def in_force(path: Path) -> Path:
    """Return where the content of a file is: of a run that was killed while it committed an epoch, beside its place."""
    committed = path.with_name(_COMMITTED)
    staged = list(path.parent.glob(f"{path.name}.*.partial")) if committed.is_file() else []
    if not staged:
        return path
    epoch = load_file(str(committed), key="--evaluate")["epoch"]
    return next((each for each in staged if str(each) == _staged(str(path), epoch)), path)


def _staged(path: str, epoch: int) -> str:
    return f"{path}.{epoch}.partial"
