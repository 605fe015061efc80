"""What a loader yields: batches (x, target, ...)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def first_two(loader: Iterable[Any], name: str) -> Iterator[tuple[Any, Any]]:
    """Yield x and target, the first two entries of each batch; others, such as an index, are dropped.

    Raises:
        TypeError: a batch is not a tuple or list of at least two; ``name`` is the loader's in the message.
    """
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            cure = f': give ((batch["x"], batch["y"]) for batch in {name})' if isinstance(batch, Mapping) else ""
            raise TypeError(f"{name} must yield (x, target, ...), got {type(batch).__name__}{cure}")
        yield batch[0], batch[1]
