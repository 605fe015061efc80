"""TeacherCache: writes, reads and verifies a cache of the teacher's outputs."""

import math
import os
import random
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.data import Dataset

from .. import _checks
from .._modes import in_mode, without_autocast
from .._progress import progress_bar
from . import fingerprint, storage
from .checksums import BlockChecks
from .description import Meta, read_meta
from .files import DATA, HEAD
from .outputs import TeacherOutputs, batches, check_mode, read_head, to_half
from .verification import largest_difference
from .views import PlainView, SeededViews, places, to_views

Mode = Literal["features", "logits", "logits+features"]


class TeacherCache:
    """A teacher's outputs for every (sample, view), written once and read from a memory-mapped file in float16.

    It is written by ``TeacherCache.write``. Opening checks that it is complete and, given the teacher or the dataset,
    that it was made from these: weights, targets, transform, views, seed and, bit for bit, a few images. Rows are
    compared with their checksum (CRC-32 of about 64 KiB) when a process first reads them, which detects corruption, not
    tampering. Any number of processes may read; the workers of a DataLoader open the files again.

    Args:
        folder: the cache's folder.
        teacher: the teacher whose weights are compared; None to skip that.
        dataset: the dataset that is compared: the ``SeededViews`` it was written from, or the plain dataset; None to
            skip that.

    Attributes:
        mode: what is stored, see ``write``.
        samples: number of samples.
        views: number of views of each sample.
        num_classes: C, for ``GuideHead``.
        feature_dim: D, for ``GuideHead``; 0 in mode ``"logits"``.
        layer: dotted name of the teacher's layer that reads the features; None in mode ``"logits"``.

    Shape:
        cache(index, view), int or int64 (N,): logits (N, C) and features (N, D), float32 on the CPU.

    Raises:
        FileNotFoundError: there is no cache.
        RuntimeError: it is incomplete, damaged (rows: when they are read), or has another source; the message says what
            differs.
        ValueError: ``dataset`` is random and not in ``SeededViews``; in a call, an index or view out of range, or
            different shapes.
        TypeError: in a call, values of another type.

    Examples:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> dataset = torch.utils.data.TensorDataset(torch.randn(6, 4), torch.arange(6))
        >>> folder, teacher = tempfile.mkdtemp(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> cache = TeacherCache.write(folder, teacher, SeededViews(dataset, views=2), progress=False)
        >>> [tuple(part.shape) for part in cache(torch.tensor([5, 0, 1]), view=1)]
        [(3, 3), (3, 8)]
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        teacher: nn.Module | None = None,
        dataset: Dataset[Any] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()  # a worker opens it again, maybe from another directory
        meta = self._meta = read_meta(self.folder)
        storage.check_complete(self.folder, meta)
        found = {} if teacher is None else fingerprint.hash_teacher(teacher)
        found |= {} if dataset is None else fingerprint.describe_views(to_views(dataset))
        different = fingerprint.differences(meta.fingerprint, found)
        if different:
            raise RuntimeError(f"{self.folder} was written for something else:{different}")
        self.mode, self.layer = meta.mode, meta.layer
        self.samples, self.views = meta.samples, meta.views
        self.num_classes, self.feature_dim = meta.num_classes, meta.feature_dim
        path = str(self.folder / DATA)
        # a private mapping: read-only files suffice, and in-place changes do not reach the file
        data = torch.from_file(path, shared=False, size=meta.rows * meta.width, dtype=torch.float16)
        self._data = data.view(meta.rows, meta.width)
        self._checks = BlockChecks(self.folder, meta, self._data)
        self._head = read_head(self.folder / HEAD, meta)

    def __call__(self, index: int | Tensor, view: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits and features of sample-views; features are None in mode ``"logits"``."""
        index, view = places("index", index, self.samples), places("view", view, self.views)
        if index.ndim and view.ndim and index.shape != view.shape:
            raise ValueError(f"view must be an int or have index's shape {tuple(index.shape)}, got {tuple(view.shape)}")
        rows = view * self.samples + index
        self._checks.before_reading(rows)
        values = self._data[rows].float()
        if self._head is not None:
            with torch.no_grad(), without_autocast(values):
                return linear(values, *self._head), values
        logits, features = values.tensor_split([self.num_classes], dim=-1)
        return logits, features if self.feature_dim else None

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache, (self.folder,)  # a worker gets the path, not a copy of the data

    @classmethod
    @torch.no_grad()
    def write(
        cls,
        folder: str | os.PathLike[str],
        teacher: nn.Module,
        views: Dataset[Any],
        *,
        mode: Mode = "features",
        layer: str | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> "TeacherCache":
        """Run the teacher over every view of every sample, or resume an interrupted run.

        Each batch is fsynced before the next begins. A call with the same arguments resumes; a complete cache is only
        opened. The teacher runs in evaluation mode without gradients, under the caller's autocast. Outputs are stored
        in float16, which holds float16 and bfloat16 outputs of at least 6e-5 exactly. One process writes at a time.

        Args:
            folder: created if missing.
            teacher: any classifier, or what ``disk_plugin.taps.with_features`` returned.
            views: ``SeededViews``, or a dataset without random augmentation, whose only view is 0.
            mode: ``"features"``: the pooled features in float16, from which the teacher's last Linear, stored beside
                them, recomputes the logits in float32. ``"logits"``: the logits in float16. ``"logits+features"``:
                both. Each equals the teacher up to float16's rounding.
            layer: dotted name of the layer whose input is the features; None for the last ``nn.Linear``.
            batch_size: sample-views per batch; keep it on resuming for a cache that is bit-identical to an
                uninterrupted one.
            num_workers: of the DataLoader.
            device: moves the teacher; None leaves it where it is.
            progress: show a bar if tqdm is installed.

        Raises:
            ValueError: an unknown mode; a random dataset without ``SeededViews``, or one that is random in spite of it;
                outputs out of float16's range; with ``"features"``, logits that the last Linear does not reproduce.
            RuntimeError: the folder's cache has another source or is damaged, or another process is writing it.
            FileExistsError: the folder holds files of the same names that are not a cache's.
            TypeError: a dataset or items of another kind.
        """
        check_mode(mode)
        _checks.integer("batch_size", batch_size, at_least=1)
        folder = Path(folder).absolute()  # the dataset may change the working directory
        source, outputs = to_views(views), TeacherOutputs(teacher, mode, layer, device)
        with in_mode(teacher, training=False):
            meta = _describe(teacher, source, outputs)
            with storage.open_writer(folder, meta, outputs.head_bytes()) as writer:
                remaining = range(writer.meta.written, meta.rows)
                loader = batches(source, remaining, batch_size, num_workers)
                for images, rows in progress_bar(loader, progress, "teacher outputs"):
                    writer.append(to_half(outputs.rows(images), rows, meta))
        return cls(folder)

    @torch.no_grad()
    def verify(
        self,
        teacher: nn.Module,
        views: Dataset[Any],
        *,
        share: float = 0.01,
        tolerance: float = 0.01,
        seed: int = 0,
        batch_size: int = 256,
        num_workers: int = 0,
        device: torch.device | str | None = None,
    ) -> float:
        """Compare every row with its checksum, then a random share with the teacher's current outputs.

        The first is one pass over the file. The second compares values up to ``tolerance``: rounding on another machine
        passes, other weights do not. A cache from a version without checksums gets only the second, with a warning.

        Args:
            teacher: as for ``write``.
            views: as for ``write``.
            share: share of the sample-views to recompute, in (0, 1]; at least one is.
            tolerance: largest difference allowed, as a share of the sample's largest absolute value.
            seed: of the choice of sample-views.
            batch_size: sample-views per batch.
            num_workers: of the DataLoader.
            device: moves the teacher; None leaves it where it is.

        Returns:
            The largest difference found, in the units of ``tolerance``.

        Raises:
            RuntimeError: rows are damaged; a difference is larger than ``tolerance`` (the message names the largest and
                its place); another number of samples or views.
            ValueError: ``share``, ``tolerance`` or ``batch_size`` out of range.
            TypeError: values of another type.
        """
        _checks.number("share", share, above=0, at_most=1)
        _checks.number("tolerance", tolerance, at_least=0)
        _checks.integer("seed", seed)
        source = to_views(views)
        if (len(source), source.views) != (self.samples, self.views):
            expected = f"{self.samples} samples in {self.views} views"
            raise RuntimeError(f"{self.folder} must be verified with {expected}, got {len(source)} in {source.views}")
        outputs = TeacherOutputs(teacher, self.mode, self.layer, device)
        # a numpy float16 would round the product, or overflow
        rows = random.Random(int(seed)).sample(range(self._meta.rows), math.ceil(float(share) * self._meta.rows))
        loader = batches(source, sorted(rows), batch_size, num_workers)
        self._checks.compare_all()
        with in_mode(teacher, training=False):
            largest, where = largest_difference(self, outputs, loader, self.samples)
        if largest > tolerance:
            raise RuntimeError(
                f"{self.folder} must equal the teacher within {tolerance} of each sample's largest value, got "
                f"{largest:.3g} in {where}, the largest difference of {len(rows)} recomputed sample-views"
            )
        return largest


def _describe(teacher: nn.Module, views: SeededViews | PlainView, outputs: TeacherOutputs) -> Meta:
    """Describe the cache to write, before any file is written."""
    found = fingerprint.describe_views(views)
    fingerprint.check_repeatable(views, found)
    images, _ = next(iter(batches(views, range(1), 1, 0)))
    logits, features = outputs(images)
    return Meta(
        mode=outputs.mode,
        layer=outputs.layer,
        num_classes=logits.shape[1],
        feature_dim=0 if features is None else features.shape[1],
        samples=len(views),
        views=views.views,
        head_bytes=len(outputs.head_bytes()),
        fingerprint=fingerprint.hash_teacher(teacher) | found,
    )
