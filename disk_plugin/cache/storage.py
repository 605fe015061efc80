"""Writes a cache's files so that an interruption loses at most one batch.

Rows and their checksums are fsynced before they are counted, and the count is replaced atomically: whenever the writer
is killed, all counted rows are on the disk. Caches of format 1, without checksums, are resumed as they are.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util
from pathlib import Path
from typing import IO

from torch import Tensor

from . import checksums
from .description import FORMATS, Meta, read_meta, write_meta
from .files import CHECKSUMS, DATA, HEAD, META, check_no_foreign_files, check_size, flush, get_size, replace
from .fingerprint import differences, to_bytes


class Writer:
    """Appends batches of rows."""

    def __init__(self, folder: Path, file: IO[bytes], meta: Meta) -> None:
        self._folder, self._file, self.meta = folder, file, meta

    def append(self, rows: Tensor) -> None:
        """Write and fsync rows (N, width), float16, then count them."""
        content, meta = to_bytes(rows), self.meta
        self._file.write(content)
        flush(self._file)
        tail = self._add_checksums(content) if meta.block_rows else 0
        self.meta = dataclasses.replace(meta, written=meta.written + len(rows), tail=tail)
        write_meta(self._folder, self.meta)

    def _add_checksums(self, content: bytes) -> int:
        """Write the checksums of the blocks completed now; return that of the rows after them."""
        meta = self.meta
        filled = meta.written % meta.block_rows * meta.row_bytes
        finished, tail = checksums.extend(meta.tail, filled, content, meta.block_rows * meta.row_bytes)
        if finished:
            with (self._folder / CHECKSUMS).open("ab") as file:
                file.write(finished)
                flush(file)
        return tail


@contextmanager
def open_writer(folder: Path, meta: Meta, head: bytes) -> Iterator[Writer]:
    """Start a cache, or resume an interrupted one, as the only writer.

    Raises:
        RuntimeError: another process is writing; the existing cache has another source, or fewer rows than counted.
        FileExistsError: there are files that are not a cache's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / DATA).open("a+b") as file:
        _lock(file, folder)
        if (folder / META).exists():
            meta = _resumed(folder, meta)
            file.truncate(meta.written * meta.row_bytes)  # drop the uncounted rest: an interrupted batch
            if get_size(folder / CHECKSUMS) > meta.checksum_bytes:
                os.truncate(folder / CHECKSUMS, meta.checksum_bytes)
        else:
            check_no_foreign_files(folder, head)
            meta = meta.with_checksums(head)
            if head:
                replace(folder / HEAD, head)
            write_meta(folder, meta)
        yield Writer(folder, file, meta)


def check_complete(folder: Path, meta: Meta) -> None:
    """Raise RuntimeError if the cache is incomplete.

    Raises:
        RuntimeError: rows are missing, or a file has another size.
    """
    if meta.written != meta.rows:
        raise RuntimeError(
            f"{folder} must hold all {meta.rows} sample-views, got {meta.written}: writing was interrupted (or goes "
            "on); TeacherCache.write with the same arguments resumes"
        )
    sizes = {DATA: meta.rows * meta.row_bytes, HEAD: meta.head_bytes, CHECKSUMS: meta.checksum_bytes}
    for name, expected in sizes.items():
        check_size(folder / name, expected)


def _resumed(folder: Path, meta: Meta) -> Meta:
    """Return the existing description if it has the same source and its files are intact."""
    found = read_meta(folder)
    different = differences(found.identity(), meta.identity())
    if different:
        raise RuntimeError(f"{folder} was written for something else, choose another folder or delete it:{different}")
    complete = found.written == found.rows
    for name, expected in ((DATA, found.written * found.row_bytes), (CHECKSUMS, found.checksum_bytes)):
        if complete or get_size(folder / name) < expected:
            check_size(folder / name, expected)
    check_size(folder / HEAD, found.head_bytes)
    # a cache begun without checksums has none for its first rows, and continues without
    return dataclasses.replace(found, format=FORMATS[-1])


def _lock(file: IO[bytes], folder: Path) -> None:
    """Lock the file for this process; the lock is released when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two writers are not detected there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"{folder} must have one writer at a time, got a second while another is writing") from error
    # forked loader workers would keep the lock for seconds after the writer is killed
    util.register_after_fork(file, lambda inherited: inherited.close())
