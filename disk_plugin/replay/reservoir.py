"""Reservoir sampling: a uniform sample, of bounded size, of rows that come in batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Rows = Mapping[str, Tensor]  # columns by name, (rows, ...) each, of one length


class Reservoir:
    """Algorithm R (Vitter, 1985): holds at most ``capacity`` rows, each row added so far with equal probability.

    Up to the capacity all are held, in the order added. Memory is allocated with the first batch, on its device.

    Args:
        capacity: number of rows to hold, >= 1.
        generator: on the CPU; used only once more rows were added than are held.
    """

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        self.capacity, self.generator, self.seen = capacity, generator, 0
        self._columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, rows: Rows) -> None:
        """Add a batch of rows (reservoir sampling).

        Raises:
            ValueError: columns other than those held.
        """
        if _layout(rows) != _layout(self._columns):
            if self.seen:
                raise ValueError(f"every batch must bring the columns {_layout(self._columns)}, got {_layout(rows)}")
            self._columns = {name: value.new_empty(self.capacity, *value.shape[1:]) for name, value in rows.items()}
        first, count = self.seen, len(next(iter(rows.values())))
        self.seen += count
        if self.seen <= self.capacity:
            for name, value in rows.items():
                self._columns[name][first : self.seen] = value
            return
        arrivals, slots = self._places(first, count)
        for name, value in rows.items():
            self._columns[name][slots.to(value.device)] = value[arrivals.to(value.device)]

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Return the held rows ``index``, int64 (B,), each below ``len(self)``."""
        return {name: column[index.to(column.device)] for name, column in self._columns.items()}

    def clear(self) -> None:
        """Clear all rows; the memory stays allocated."""
        self.seen = 0

    @property
    def bytes_per_row(self) -> int:
        """Bytes per row; 0 before the first."""
        return sum(column[:1].nbytes for column in self._columns.values())

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the held rows, and how many rows were added."""
        held = {name: column[: len(self)].clone() for name, column in self._columns.items()} if self.seen else {}
        return {"seen": self.seen, "rows": held}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the rows of another reservoir on ``device``.

        Raises:
            RuntimeError: its capacity differs.
        """
        seen, rows = state["seen"], state["rows"]
        held = len(next(iter(rows.values()))) if rows else 0
        if held != min(seen, self.capacity):
            raise RuntimeError(f"expected the record of a capacity of {self.capacity}, got {held} of {seen} positions")
        self.clear()
        if rows:
            self.add({name: value.to(device) for name, value in rows.items()})
        self.seen = seen

    def _places(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return which of the new rows are kept, and in which slots, each slot once."""
        number = torch.arange(first, first + count)
        # row n is kept with probability capacity / (n + 1), in a uniformly drawn slot
        drawn = (torch.rand(count, dtype=torch.float64, generator=self.generator) * (number + 1)).long()
        slots = torch.where(number < self.capacity, number, drawn)
        arrivals = (slots < self.capacity).nonzero().squeeze(1)
        slots, which = torch.unique(slots[arrivals], return_inverse=True)
        # if several rows fall on one slot, the last is kept, as if they had been added one by one
        return torch.zeros_like(slots).scatter_reduce(0, which, arrivals, "amax"), slots


def _layout(rows: Rows) -> dict[str, tuple[tuple[int, ...], torch.dtype, torch.device]]:
    return {name: (tuple(value.shape[1:]), value.dtype, value.device) for name, value in rows.items()}
