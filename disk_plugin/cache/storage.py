"""The files of a cache: what they hold, how they are written so that an interruption costs one batch at most.

``data.bin`` holds the rows, float16, one view after the other; ``head.pt`` the teacher's last layer, where logits are
recomputed; ``meta.json`` what the cache is of and how many rows are written. Rows are on the disk before they are
counted, and the count is replaced as a whole: whenever the writer dies, what is counted is there.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util
from pathlib import Path
from typing import IO

from torch import Tensor

from .fingerprint import Fingerprint, as_bytes, differences

META, DATA, HEAD = "meta.json", "data.bin", "head.pt"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a cache holds (``mode``, sizes), what it is of (``fingerprint``), and how far it is written."""

    mode: str
    layer: str | None
    num_classes: int
    feature_dim: int
    samples: int
    views: int
    head_bytes: int
    fingerprint: Fingerprint
    written: int = 0
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Number of sample-views."""
        return self.samples * self.views

    @property
    def width(self) -> int:
        """Values in a row: features, logits, or logits and then features."""
        return {"features": 0}.get(self.mode, self.num_classes) + self.feature_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return 2 * self.width

    def identity(self) -> Fingerprint:
        """Everything that has to be the same for writing to go on."""
        shape = {name: getattr(self, name) for name in ("mode", "layer", "num_classes", "feature_dim")}
        return {**shape, **self.fingerprint}


class Writer:
    """Appends batches of rows behind those that are already there."""

    def __init__(self, folder: Path, file: IO[bytes], meta: Meta) -> None:
        self._folder, self._file, self.meta = folder, file, meta

    def append(self, rows: Tensor) -> None:
        """Put rows (N, width), float16, on the disk, then count them."""
        self._file.write(as_bytes(rows))
        _flush(self._file)
        self.meta = dataclasses.replace(self.meta, written=self.meta.written + len(rows))
        write_meta(self._folder, self.meta)


@contextmanager
def open_writer(folder: Path, meta: Meta, head: bytes) -> Iterator[Writer]:
    """Start a cache, or go on with what an interrupted writer left, as the only writer.

    Raises:
        RuntimeError: another process is writing; what is there is of something else, or shorter than counted.
        FileExistsError: there are data that no cache knows of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / DATA).open("a+b") as file:
        _lock(file, folder)
        size = file.seek(0, os.SEEK_END)
        if (folder / META).exists():
            meta = _resumed(folder, meta, size)
            file.truncate(meta.written * meta.row_bytes)  # what follows was not counted: the batch that was cut off
        elif size:
            raise FileExistsError(f"{folder / DATA} must not exist without its {META}, got {size} bytes")
        else:
            if head:
                _replace(folder / HEAD, head)
            write_meta(folder, meta)
        yield Writer(folder, file, meta)


def read_meta(folder: Path) -> Meta:
    """Read what a folder holds, checking nothing but that it can be read.

    Raises:
        FileNotFoundError: there is no cache.
        RuntimeError: ``meta.json`` is damaged, or of another format.
    """
    path = folder / META
    if not path.exists():
        raise FileNotFoundError(f"{folder} must hold a cache that TeacherCache.write has made, got no {META}")
    try:
        entries = json.loads(path.read_text())
        found = entries["format"]
        meta = Meta(**entries) if found == FORMAT else None
    except (ValueError, TypeError, KeyError) as error:
        raise RuntimeError(f"{path} must be a cache's description, got {path.stat().st_size} damaged bytes") from error
    if meta is None:
        raise RuntimeError(f"{path} must have format {FORMAT}, got {found}")
    return meta


def write_meta(folder: Path, meta: Meta) -> None:
    """Replace the description as a whole."""
    _replace(folder / META, (json.dumps(dataclasses.asdict(meta), indent=1) + "\n").encode())


def check_complete(folder: Path, meta: Meta) -> None:
    """Refuse a cache that is not whole.

    Raises:
        RuntimeError: rows are missing, or a file has another size.
    """
    if meta.written != meta.rows:
        raise RuntimeError(
            f"{folder} must hold all {meta.rows} sample-views, got {meta.written}: writing was interrupted (or goes "
            "on); TeacherCache.write with the same arguments resumes"
        )
    for name, expected in ((DATA, meta.rows * meta.row_bytes), (HEAD, meta.head_bytes)):
        _check_size(folder / name, expected)


def _resumed(folder: Path, meta: Meta, size: int) -> Meta:
    """Return what is there if it is of the same thing and whole."""
    found = read_meta(folder)
    different = differences(found.identity(), meta.identity())
    if different:
        raise RuntimeError(f"{folder} was written for something else, choose another folder or delete it:{different}")
    counted = found.written * found.row_bytes
    if size < counted or found.written == found.rows:
        _check_size(folder / DATA, counted)
    _check_size(folder / HEAD, found.head_bytes)
    return found


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise RuntimeError(f"{path} must have {expected} bytes, got {size}: delete the folder and write it anew")


def _lock(file: IO[bytes], folder: Path) -> None:
    """Become the only writer; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing keeps two writers apart there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"{folder} must have one writer at a time, got a second while another is writing") from error
    # forked loader workers would hold the lock for seconds after the writer is killed
    util.register_after_fork(file, lambda inherited: inherited.close())


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is seen either as it was or as it becomes."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(content)
        _flush(file)
    fresh.replace(path)


def _flush(file: IO[bytes]) -> None:
    """Have the disk hold what was written."""
    file.flush()
    os.fsync(file.fileno())
