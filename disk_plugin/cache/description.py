"""``meta.json``: a cache's contents, source and progress."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import checksums
from .files import FOREIGN_REMEDY, META, get_size, replace
from .fingerprint import Fingerprint

FORMATS = 1, 2  # without checksums, with


@dataclasses.dataclass(frozen=True)
class Meta:
    """A cache's contents (``mode``, sizes), source (``fingerprint``), progress and checksums."""

    mode: str
    layer: str | None
    num_classes: int
    feature_dim: int
    samples: int
    views: int
    head_bytes: int
    fingerprint: Fingerprint
    written: int = 0
    format: int = FORMATS[-1]
    head_checksum: int | None = None  # None: the head has none
    block_rows: int = 0  # 0: the rows have no checksums
    tail: int = 0  # checksum of the rows after the last full block

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

    @property
    def checksum_bytes(self) -> int:
        """Bytes of the checksums of the full blocks written so far."""
        return checksums.BYTES * (self.written // self.block_rows) if self.block_rows else 0

    def with_checksums(self, head: bytes) -> "Meta":
        """Return the description of a new cache whose files have checksums."""
        return dataclasses.replace(
            self, head_checksum=zlib.crc32(head), block_rows=checksums.rows_in_block(self.row_bytes)
        )

    def identity(self) -> Fingerprint:
        """Return all that must be equal to resume writing."""
        shape = {name: getattr(self, name) for name in ("mode", "layer", "num_classes", "feature_dim")}
        return {**shape, **self.fingerprint}


def read_meta(folder: Path) -> Meta:
    """Read and validate a folder's ``meta.json``, not its other files.

    Raises:
        FileNotFoundError: there is no cache.
        RuntimeError: ``meta.json`` is damaged, not ours, or of another format.
    """
    path = folder / META
    if not path.exists():
        raise FileNotFoundError(f"{folder} must hold a cache that TeacherCache.write has made, got no {META}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = entries["format"]
        if found in FORMATS:
            return _checked(entries)
    except (ValueError, TypeError, KeyError) as error:
        came = f"{get_size(path)} bytes, damaged or another program's ({type(error).__name__}: {error})"
        raise RuntimeError(f"{path} must be a cache's description, got {came}: {FOREIGN_REMEDY}") from error
    raise RuntimeError(f"{path} must have format {' or '.join(map(str, FORMATS))}, got {found!r}: {FOREIGN_REMEDY}")


def write_meta(folder: Path, meta: Meta) -> None:
    """Replace the description atomically."""
    entries = dataclasses.asdict(meta)
    entries["checksum"] = _checksum(entries)
    replace(folder / META, (json.dumps(entries, indent=1) + "\n").encode())


def _checked(entries: dict[str, Any]) -> Meta:
    """Return the description from a file's entries; ValueError, TypeError or KeyError if they are invalid."""
    found = entries.pop("checksum", None)
    if (found is not None or "block_rows" in entries) and found != _checksum(entries):
        raise ValueError(f"its checksum must be {_checksum(entries)}, got {found}")
    for name in ("samples", "views", "num_classes", "feature_dim", "head_bytes", "written"):
        if not isinstance(entries[name], int):
            raise TypeError(f"{name} must be an int, got {entries[name]!r}")
    return Meta(**entries)


def _checksum(entries: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(entries, sort_keys=True).encode()):08x}"
