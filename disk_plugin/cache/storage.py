"""How the files of a cache are written, so that an interruption costs one batch at most.

Rows and their checksums are on the disk before they are counted, and the count is replaced as a whole: whenever the
writer dies, what is counted is there. Caches of format 1, which had no checksums, are gone on with as they are.
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
from .files import CHECKSUMS, DATA, HEAD, META, check_size, flush, refuse_strangers, replace, size_of
from .fingerprint import as_bytes, differences


class Writer:
    """Appends batches of rows behind those that are already there."""

    def __init__(self, folder: Path, file: IO[bytes], meta: Meta) -> None:
        self._folder, self._file, self.meta = folder, file, meta

    def append(self, rows: Tensor) -> None:
        """Put rows (N, width), float16, on the disk, then count them."""
        content, meta = as_bytes(rows), self.meta
        self._file.write(content)
        flush(self._file)
        tail = self._add_checksums(content) if meta.block_rows else 0
        self.meta = dataclasses.replace(meta, written=meta.written + len(rows), tail=tail)
        write_meta(self._folder, self.meta)

    def _add_checksums(self, content: bytes) -> int:
        """Put those of the blocks that are full now on the disk; return that of the rows after them."""
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
    """Start a cache, or go on with what an interrupted writer left, as the only writer.

    Raises:
        RuntimeError: another process is writing; what is there is of something else, or shorter than counted.
        FileExistsError: there are files that no cache knows of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / DATA).open("a+b") as file:
        _lock(file, folder)
        if (folder / META).exists():
            meta = _resumed(folder, meta)
            file.truncate(meta.written * meta.row_bytes)  # what follows was not counted: the batch that was cut off
            if size_of(folder / CHECKSUMS) > meta.checksum_bytes:
                os.truncate(folder / CHECKSUMS, meta.checksum_bytes)
        else:
            refuse_strangers(folder, head)
            meta = meta.with_checksums(head)
            if head:
                replace(folder / HEAD, head)
            write_meta(folder, meta)
        yield Writer(folder, file, meta)


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
    sizes = {DATA: meta.rows * meta.row_bytes, HEAD: meta.head_bytes, CHECKSUMS: meta.checksum_bytes}
    for name, expected in sizes.items():
        check_size(folder / name, expected)


def _resumed(folder: Path, meta: Meta) -> Meta:
    """Return what is there if it is of the same thing and whole."""
    found = read_meta(folder)
    different = differences(found.identity(), meta.identity())
    if different:
        raise RuntimeError(f"{folder} was written for something else, choose another folder or delete it:{different}")
    complete = found.written == found.rows
    for name, expected in ((DATA, found.written * found.row_bytes), (CHECKSUMS, found.checksum_bytes)):
        if complete or size_of(folder / name) < expected:
            check_size(folder / name, expected)
    check_size(folder / HEAD, found.head_bytes)
    # what was begun without checksums has none for its first rows: it goes on so
    return dataclasses.replace(found, format=FORMATS[-1])


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
