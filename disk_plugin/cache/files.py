"""The files of a cache by name, and helpers to write them atomically, flush them and validate them.

``data.bin`` holds the rows, float16, one view after the other; ``checksums.bin`` the checksum of each full block of
them; ``head.pt`` the teacher's last layer, where logits are recomputed; ``meta.json`` the cache's source, how many rows
are written, and the checksums of the rows after the last full block, of the head and of itself.
"""

import os
from pathlib import Path
from typing import IO

META, DATA, HEAD, CHECKSUMS = "meta.json", "data.bin", "head.pt", "checksums.bin"
REMEDY = "delete the folder and write it anew"
FOREIGN_REMEDY = "choose another folder, or delete this one and write it anew"


def replace(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(content)
        flush(file)
    fresh.replace(path)


def flush(file: IO[bytes]) -> None:
    """Flush and fsync."""
    file.flush()
    os.fsync(file.fileno())


def get_size(path: Path) -> int:
    """Return a file's size in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def check_size(path: Path, expected: int) -> None:
    """Raise RuntimeError if the file has another size."""
    size = get_size(path)
    if size != expected:
        raise RuntimeError(f"{path} must have {expected} bytes, got {size}: {REMEDY}")


def check_no_foreign_files(folder: Path, head: bytes) -> None:
    """Raise FileExistsError if other files are in the way; a head equal to ``head``, of a killed writer, is not.

    Raises:
        FileExistsError: naming the file.
    """
    for name, ours in ((DATA, b""), (CHECKSUMS, b""), (HEAD, head)):
        path = folder / name
        size = get_size(path)
        if size and (size != len(ours) or path.read_bytes() != ours):
            raise FileExistsError(f"{path} must not exist without its {META}, got {size} bytes: {FOREIGN_REMEDY}")
