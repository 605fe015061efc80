"""CRC-32 of a cache's files: detects every flipped byte and all but 2**-32 of other corruption, not tampering.

``data.bin`` has a checksum per block of whole rows, about 64 KiB: small enough to check a row when it is first read,
large enough for the checksums to take less than 1 byte in 10,000.
"""

import ctypes
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .files import CHECKSUMS, DATA, REMEDY

if TYPE_CHECKING:
    from .description import Meta

BLOCK_BYTES = 2**16
BYTES = 4  # of a checksum


def rows_in_block(row_bytes: int) -> int:
    """Return the number of rows per block."""
    return max(1, BLOCK_BYTES // row_bytes)


def extend(tail: int, filled: int, content: bytes, block_bytes: int) -> tuple[bytes, int]:
    """Add content after the ``filled`` bytes of an incomplete block, whose checksum so far is ``tail``.

    Returns:
        The concatenated checksums of the blocks completed now, and that of the incomplete one.
    """
    view, finished, start = memoryview(content), b"", 0
    while start < len(view):
        end = start + block_bytes - filled
        tail = zlib.crc32(view[start:end], tail)
        if end <= len(view):
            finished += to_bytes(tail)
            tail = filled = 0
        start = end
    return finished, tail


def to_bytes(checksum: int) -> bytes:
    """Return a checksum as stored bytes."""
    return checksum.to_bytes(BYTES, "little")


def check_file(path: Path, content: bytes, expected: int) -> None:
    """Validate a file's checksum.

    Raises:
        RuntimeError: it differs; the message holds both checksums.
    """
    came = zlib.crc32(content)
    if came != expected:
        raise RuntimeError(f"{path} must have CRC-32 {expected:08x}, got {came:08x}: it is damaged; {REMEDY}")


class BlockChecks:
    """Compares each block of the rows with its checksum, once, when one of its rows is first read.

    Args:
        folder: the cache's folder.
        meta: its description; without blocks, as in caches of format 1, nothing is compared.
        data: the memory-mapped rows, (rows, width).
    """

    def __init__(self, folder: Path, meta: "Meta", data: Tensor) -> None:
        self._folder, self._meta, self._data = folder, meta, data
        self._expected = (folder / CHECKSUMS).read_bytes() if meta.checksum_bytes else b""
        if meta.block_rows and meta.rows % meta.block_rows:
            self._expected += to_bytes(meta.tail)
        count = len(self._expected) // BYTES
        self._unread: Tensor | None = torch.ones(count, dtype=torch.bool) if count else None

    def before_reading(self, rows: Tensor) -> None:
        """Compare the blocks of these rows that were not compared yet.

        Raises:
            RuntimeError: a block is damaged; the message holds file, place and both checksums.
        """
        unread = self._unread
        if unread is None:
            return
        blocks = rows.flatten() // self._meta.block_rows
        fresh = sorted(set(blocks[unread[blocks]].tolist()))
        if not fresh:
            return
        for block in fresh:
            self._compare(block)
        unread[fresh] = False
        if not unread.any():
            self._unread = None

    def compare_all(self) -> None:
        """Compare every block, even those compared before: one pass over the file.

        Raises:
            RuntimeError: as in ``before_reading``.
        """
        if not self._meta.block_rows:
            warnings.warn(
                f"{self._folder} was written without checksums: only damaged rows among the recomputed ones are found. "
                "share=1 recomputes all; a cache written anew has checksums",
                stacklevel=4,  # to the caller of verify, whose decorator has a frame
            )
        for block in range(len(self._expected) // BYTES):
            self._compare(block)
        self._unread = None

    def _compare(self, block: int) -> None:
        meta, start = self._meta, block * self._meta.block_rows
        rows = self._data[start : start + meta.block_rows]
        # the mapped memory itself, not a copy
        came = zlib.crc32((ctypes.c_char * rows.nbytes).from_address(rows.data_ptr()))
        expected = int.from_bytes(self._expected[block * BYTES : (block + 1) * BYTES], "little")
        if came != expected:
            first, last = (divmod(row, meta.samples) for row in (start, start + len(rows) - 1))
            raise RuntimeError(
                f"{self._folder / DATA} must have CRC-32 {expected:08x} in its block {block} (from byte "
                f"{start * meta.row_bytes}, {rows.nbytes} bytes: index {first[1]}, view {first[0]} to index {last[1]}, "
                f"view {last[0]}), got {came:08x}: it or its {CHECKSUMS} is damaged; {REMEDY}"
            )
