"""What one call leaves for the next: a file of states, a file of results, and the time that is left."""

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from small_images.views import save


class Guard:
    """Says when to stop: when the seconds are over, or on SIGTERM."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds, self.told = time.monotonic(), seconds, False

    def listen(self) -> "Guard":
        """Stop on SIGTERM from now on."""
        signal.signal(signal.SIGTERM, self._tell)
        return self

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self.told = True

    @property
    def over(self) -> bool:
        """Whether to stop now."""
        return self.told or self.passed >= self.seconds

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begin


class Store:
    """States by name in one file, each with the settings that it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: dict[str, dict[str, Any]] = torch.load(path, "cpu", weights_only=True) if path.exists() else {}

    def get(self, name: str, settings: dict[str, Any]) -> Any:
        """Return what was kept under the name with these settings, or None."""
        held = self.held.get(name)
        return held["value"] if held and held["settings"] == json.dumps(settings) else None

    def put(self, name: str, settings: dict[str, Any], value: Any) -> None:
        """Keep it in place of what had the name."""
        self.held[name] = {"settings": json.dumps(settings), "value": value}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save(self.held, self.path)


class Results:
    """One line of JSON per finished student, written as it comes.

    Args:
        path: the file.
        protocol: what is equal for all lines.

    Raises:
        RuntimeError: the file holds results of another protocol.
    """

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        self.path, self.protocol = path, protocol
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for row in self.rows:
            if row["protocol"] != protocol:
                raise RuntimeError(
                    f"{path} holds results of another protocol; expected {protocol}, got {row['protocol']}: "
                    f"remove it or choose another --out"
                )

    def missing(self, student: str, seed: int, methods: list[str]) -> list[str]:
        """Return the methods without a result, in their order."""
        done = {row["method"] for row in self.rows if (row["student"], row["seed"]) == (student, seed)}
        return [method for method in methods if method not in done]

    def add(self, row: dict[str, Any]) -> None:
        """Append a line."""
        row = {**row, "protocol": self.protocol}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
