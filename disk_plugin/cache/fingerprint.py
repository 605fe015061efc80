"""The source of a cache: the teacher's weights, the dataset and its transform, as short values to compare."""

import ctypes
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..taps import FeatureTap
from .views import PlainView, SeededViews, get_image

Fingerprint = dict[str, str | int | None]
_PROBES = 8  # number of images that are compared bit for bit


def hash_teacher(teacher: nn.Module) -> Fingerprint:
    """Hash names, dtypes, shapes and bytes of a teacher's state, without its tap or torch.compile's wrapper."""
    model = teacher.model if isinstance(teacher, FeatureTap) else teacher
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name.replace('_orig_mod.', '')} ".encode())
        _add(digest, value)
    return {"teacher weights": digest.hexdigest()}


def describe_views(views: SeededViews | PlainView) -> Fingerprint:
    """Describe dataset, transform and views; hashes of a few images tell equal descriptions apart."""
    return {
        "data set": " of ".join(_describe(dataset) for dataset in _wrapped(views.dataset)),
        "transform": "; ".join(_transform(dataset) for dataset in _wrapped(views.dataset)),
        "views": views.views,
        "seed": views.seed,
        "images": _images(views),
    }


def check_repeatable(views: SeededViews | PlainView, found: Fingerprint) -> None:
    """Read the probed images again: a dataset with a generator of its own gives others.

    Raises:
        ValueError: they differ.
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
    """Yield a dataset and those inside it, as in ``Subset(dataset, indices)``."""
    yield dataset
    inner = getattr(dataset, "dataset", None)
    if isinstance(inner, Dataset):
        yield from _wrapped(inner)


def _describe(dataset: Any) -> str:
    """Name a dataset with its length and, if it has them, hashes of its targets and of a subset's indices."""
    parts = [f"{type(dataset).__name__} ({len(dataset)} samples"]
    for name in ("targets", "indices"):
        values = getattr(dataset, name, None)
        if isinstance(values, Iterable):
            plain = values.tolist() if hasattr(values, "tolist") else list(values)
            parts.append(f"{name} {hashlib.sha256(repr(plain).encode()).hexdigest()[:16]}")
    return ", ".join(parts) + ")"


def _transform(dataset: Any) -> str:
    """Return the transform's repr, without memory addresses and the modules of objects shown by them."""
    found = getattr(dataset, "transforms", None)
    found = getattr(dataset, "transform", None) if found is None else found
    # a class of the writing script is in __main__, but elsewhere for the reading script
    plain = re.sub(r"<[\w.]*?(\w+) object at 0x[0-9a-fA-F]+>", r"<\1 object>", repr(found))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", plain)


def _images(views: SeededViews | PlainView) -> str:
    """Hash the images of a few (index, view) pairs, spread over both."""
    digest = hashlib.sha256()
    for probe in range(_PROBES):
        index, view = (probe * (size - 1) // (_PROBES - 1) for size in (len(views), views.views))
        _add(digest, get_image(views.item(index, view)))
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Update a hash with dtype, shape and bytes of a tensor; with the repr of any other value."""
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(to_bytes(value))


def to_bytes(tensor: Tensor) -> bytes:
    """Copy a tensor's bytes without numpy, which is optional."""
    tensor = tensor.detach().to("cpu", memory_format=torch.contiguous_format).contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
