"""A dataset whose random augmentation is a pure function of (sample, view)."""

import hashlib
import importlib
import numbers
import operator
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .. import _checks


class SeededViews(Dataset[tuple[Any, ...]]):
    """A dataset with ``views`` fixed augmentations of each sample, so that a teacher's outputs can be cached.

    While an item is read, the global generators of torch (CPU), numpy and ``random`` are seeded with a hash of (seed,
    index, view); afterwards they are restored. So an item does not depend on the order of reading, the worker, the
    epoch or the run. Not covered are generators owned by the dataset or its transforms (``TeacherCache.write`` detects
    them), and what mixes samples after the dataset, such as mixup.

    ``views[index]`` is the dataset's item in the current view with its place appended: (image, target, index, view).
    Training cycles through the views: call ``views.set_epoch(epoch)`` before each epoch, also with persistent workers.

    Args:
        dataset: map-style, with a length; its items are tuples or lists such as (image, target).
        views: number of augmentations of each sample, >= 1.
        seed: another seed gives other views.

    Raises:
        ValueError: ``views`` < 1, an empty dataset; in ``set_epoch`` an epoch < 0.
        TypeError: ``dataset`` is not map-style; values or items of another type.
        IndexError: an index or view out of range.

    Examples:
        >>> import torch
        >>> class Noise(torch.utils.data.Dataset):
        ...     __len__, __getitem__ = lambda self: 5, lambda self, index: (torch.rand(3), index % 2)
        >>> views = SeededViews(Noise(), views=4)
        >>> image, target, index, view = views[2]
        >>> torch.equal(image, views[2][0]), torch.equal(image, views.item(2, view=1)[0])
        (True, False)
    """

    def __init__(self, dataset: Dataset[Any], views: int, *, seed: int = 0) -> None:
        check_map_style(dataset)
        _checks.integer("views", views, at_least=1)
        _checks.integer("seed", seed)
        self.dataset, self.views, self.seed = dataset, int(views), int(seed)  # Python ints for a cache's JSON
        # in shared memory, so that persistent workers see the next epoch
        self._view = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Select view ``epoch % views`` in every worker: call it before the epoch's first batch."""
        _checks.integer("epoch", epoch, at_least=0)
        self._view.fill_(epoch % self.views)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.item(index, int(self._view))

    def item(self, index: int, view: int) -> tuple[Any, ...]:
        """Return sample ``index`` in the given view, with both appended."""
        index, view = place("index", index, len(self)), place("view", view, self.views)
        with seeded(self.seed, index, view):
            item = self.dataset[index]
        return (*to_tuple(item), index, view)


class PlainView(Dataset[tuple[Any, ...]]):
    """A dataset without random augmentation, as its only view; reading raises if it draws random numbers."""

    views, seed = 1, None

    def __init__(self, dataset: Dataset[Any]) -> None:
        check_map_style(dataset)
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def item(self, index: int, view: int) -> tuple[Any, ...]:
        """Return sample ``index`` with (index, 0) appended, as ``SeededViews.item`` does."""
        index, view = place("index", index, len(self)), place("view", view, 1)
        before = _states()
        item = self.dataset[index]
        if _states() != before:
            raise ValueError(
                f"reading item {index} must not draw random numbers, as the student would see another image than the "
                "teacher: wrap the dataset, SeededViews(dataset, views=V), and train on the wrapper"
            )
        return (*to_tuple(item), index, view)


def to_views(dataset: Any) -> SeededViews | PlainView:
    """Return ``SeededViews`` unchanged, any other dataset as one view that must not be random."""
    return dataset if isinstance(dataset, SeededViews) else PlainView(dataset)


@contextmanager
def seeded(seed: int, index: int, view: int) -> Iterator[None]:
    """Seed the three global generators with a hash of (seed, index, view) and restore them afterwards."""
    # a hash, not a sum: neighbours must not share a stream
    digest = hashlib.sha256(f"{seed} {index} {view}".encode()).digest()
    words = [int.from_bytes(digest[start : start + 4], "little") for start in range(0, 32, 4)]
    numpy = _numpy_random()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = None if numpy is None else numpy.get_state()
    try:
        torch.default_generator.manual_seed(words[0])  # torch.manual_seed would also seed the GPUs' generators
        random.seed(digest)
        if numpy is not None:
            numpy.seed(words)
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy is not None:
            numpy.set_state(numpy_state)


def check_map_style(dataset: Any) -> None:
    """Validate a map-style dataset with a length."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"dataset must be map-style, with a length, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError("dataset must hold at least one sample, got none")


def place(name: str, value: Any, size: int) -> int:
    """Return an index as an int in [0, size); IndexError ends a loop over the dataset."""
    position = operator.index(value)
    if not 0 <= position < size:
        raise IndexError(f"{name} must be in [0, {size}), got {position}")
    return position


def places(name: str, value: Any, size: int) -> Tensor:
    """Return an int (Python's or numpy's) or int64 indices as a CPU tensor; validate that they are in [0, size)."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        smallest = largest = int(value)
    elif isinstance(value, Tensor) and value.dtype == torch.int64:
        value = value.cpu()
        smallest, largest = (int(bound) for bound in value.aminmax()) if value.numel() else (0, 0)
    else:
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int or an int64 Tensor, got {came}")
    if smallest < 0 or largest >= size:
        raise ValueError(f"{name} must be in [0, {size}), got {smallest} to {largest}")
    return value if isinstance(value, Tensor) else torch.tensor(smallest)


def to_tuple(item: Any) -> tuple[Any, ...]:
    """Return an item as a tuple; raise TypeError if it is not a tuple or list."""
    if not isinstance(item, tuple | list) or not item:
        raise TypeError(f"the dataset's items must be tuples such as (image, target), got {type(item).__name__}")
    return tuple(item)


def get_image(item: tuple[Any, ...]) -> Tensor:
    """Return the teacher's input: the item's first part."""
    if not isinstance(item[0], Tensor):
        raise TypeError(f"the dataset's items must begin with the image as a Tensor, got {type(item[0]).__name__}")
    return item[0]


def _states() -> tuple[Any, ...]:
    """Return the states of the three global generators, in a form that compares with ==."""
    numpy = _numpy_random()
    numpy_state = None if numpy is None else pickle.dumps(numpy.get_state())  # arrays inside
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state


def _numpy_random() -> Any:
    """Return ``numpy.random``, or None without numpy, which is optional."""
    try:
        return importlib.import_module("numpy.random")
    except ImportError:
        return None
