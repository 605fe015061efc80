"""What a cache is of: the teacher's weights, the data set and its transform, as short values that can be compared."""

import ctypes
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..taps import FeatureTap
from .views import PlainView, SeededViews, image_of

Fingerprint = dict[str, str | int | None]
_PROBES = 8  # images that are read and compared bit for bit


def of_teacher(teacher: nn.Module) -> Fingerprint:
    """Hash the names, types, shapes and bytes of the state; a tap, or torch.compile's wrapper, stands for its model."""
    model = teacher.model if isinstance(teacher, FeatureTap) else teacher
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name.replace('_orig_mod.', '')} ".encode())
        _add(digest, value)
    return {"teacher weights": digest.hexdigest()}


def of_views(views: SeededViews | PlainView) -> Fingerprint:
    """Describe data set, transform and views; a few images tell apart what has the same description."""
    return {
        "data set": " of ".join(_describe(dataset) for dataset in _wrapped(views.dataset)),
        "transform": "; ".join(_transform(dataset) for dataset in _wrapped(views.dataset)),
        "views": views.views,
        "seed": views.seed,
        "images": _images(views),
    }


def refuse_random(views: SeededViews | PlainView, found: Fingerprint) -> None:
    """Read the probed images again: what a generator of the data set's own draws cannot be repeated.

    Raises:
        ValueError: they came out differently.
    """
    again = _images(views)
    if again != found["images"]:
        raise ValueError(
            f"{type(views.dataset).__name__} must give the same image for the same sample and view, got two when read "
            "twice: it draws from a generator of its own, or keeps state. SeededViews seeds the global generators of "
            "torch, numpy and random: draw from these"
        )


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str:
    """Return a line for each value of ``got`` that is not the expected one; empty if there is none."""
    lines = [
        f"\n  {name}: expected {expected.get(name)}, got {value}"
        for name, value in got.items()
        if expected.get(name) != value
    ]
    return "".join(lines)


def _wrapped(dataset: Any) -> Iterator[Any]:
    """Yield a data set and those inside it, as in ``Subset(dataset, indices)``."""
    yield dataset
    inner = getattr(dataset, "dataset", None)
    if isinstance(inner, Dataset):
        yield from _wrapped(inner)


def _describe(dataset: Any) -> str:
    """Name a data set with its length and, where it has them, hashes of its targets and of a subset's indices."""
    parts = [f"{type(dataset).__name__} ({len(dataset)} samples"]
    for name in ("targets", "indices"):
        values = getattr(dataset, name, None)
        if isinstance(values, Iterable):
            plain = values.tolist() if hasattr(values, "tolist") else list(values)
            parts.append(f"{name} {hashlib.sha256(repr(plain).encode()).hexdigest()[:16]}")
    return ", ".join(parts) + ")"


def _transform(dataset: Any) -> str:
    """Return the transform as it describes itself, without memory addresses and the modules that stand beside them."""
    found = getattr(dataset, "transforms", None)
    found = getattr(dataset, "transform", None) if found is None else found
    # a class of the script that writes is in __main__, and elsewhere for the script that reads
    plain = re.sub(r"<[\w.]*?(\w+) object at 0x[0-9a-fA-F]+>", r"<\1 object>", repr(found))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", plain)


def _images(views: SeededViews | PlainView) -> str:
    """Hash the images of a few (index, view), spread over both."""
    digest = hashlib.sha256()
    for probe in range(_PROBES):
        index, view = (probe * (size - 1) // (_PROBES - 1) for size in (len(views), views.views))
        _add(digest, image_of(views.item(index, view)))
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Feed type, shape and bytes of a tensor to a hash; another value by its repr."""
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(as_bytes(value))


def as_bytes(tensor: Tensor) -> bytes:
    """Copy a tensor's bytes out; torch alone, where there need be no numpy."""
    tensor = tensor.detach().to("cpu", memory_format=torch.contiguous_format).contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
