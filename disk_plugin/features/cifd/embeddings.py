"""A teacher's embeddings, from a cache or from one pass over a loader, for fitting on them."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..._modes import in_mode
from ..._progress import progress_bar
from ...cache import TeacherCache
from ...taps import FeatureTap, with_features


class Rows(NamedTuple):
    """Embeddings (N, D), teacher logits (N, C) and targets (N,) or (N, C) of some samples; None where not given."""

    features: Tensor
    logits: Tensor | None = None
    target: Tensor | None = None


class Embeddings:
    """A teacher's embeddings in memory.

    Args:
        features: (N, D), what the teacher's last Linear reads.
        logits: (N, C), the teacher's; None to fit without classes.
        target: class indices (N,) or probabilities (N, C); None to fit without classes.

    Raises:
        ValueError: different numbers of rows, embeddings that are not (N, D), or that are not finite.
    """

    def __init__(self, features: Tensor, logits: Tensor | None = None, target: Tensor | None = None) -> None:
        if features.ndim != 2 or not len(features):
            raise ValueError(f"embeddings must have shape (N, D), got {tuple(features.shape)}")
        for name, value in {"logits": logits, "target": target}.items():
            if value is not None and len(value) != len(features):
                raise ValueError(f"{name} must have a row for each of the {len(features)} embeddings, got {len(value)}")
        if (logits is None) != (target is None):
            raise ValueError("logits and target go together, got one of them")
        features = upcast(features)
        check_finite("embeddings", features)
        if logits is not None and target is not None:
            logits = upcast(logits)
            check_finite("logits", logits)
            check_target(target, logits.shape[1])
        self.rows = Rows(features, logits, target)

    def __len__(self) -> int:
        return len(self.rows.features)

    def read(self, index: Tensor, epoch: int) -> Rows:
        """Return the rows of some samples, the same in every epoch."""
        return Rows(*(None if value is None else value[index] for value in self.rows))  # type: ignore[arg-type]


class CachedEmbeddings:
    """A teacher's embeddings in a ``TeacherCache``; epoch e reads view e modulo the number of views.

    Raises:
        ValueError: a cache without features, another number of targets.
    """

    def __init__(self, cache: TeacherCache, target: Tensor | None) -> None:
        if not cache.feature_dim:
            raise ValueError(f"the cache must hold features, got mode {cache.mode!r}: write it with mode='features'")
        if target is None or len(target) != cache.samples:
            found = "none" if target is None else len(target)
            raise ValueError(f"targets must have one for each of the cache's {cache.samples} samples, got {found}")
        check_target(target, cache.num_classes)
        self.cache, self.target = cache, target

    def __len__(self) -> int:
        return self.cache.samples

    def read(self, index: Tensor, epoch: int) -> Rows:
        """Return the rows of some samples in the epoch's view."""
        logits, found = self.cache(index, epoch % self.cache.views)
        features = cast(Tensor, found)  # the mode was checked on construction
        check_finite("embeddings", features)
        return Rows(features, logits, self.target[index])


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError for rows with NaN or infinity."""
    bad = ~values.isfinite().all(1)
    if bad.any():
        shown = bad.nonzero().flatten()[:5].tolist()
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in {int(bad.sum())} of {len(values)} rows, such as {shown}"
        )


def check_target(target: Tensor, classes: int) -> None:
    """Raise for targets that are neither class indices from 0 to C - 1 nor probabilities."""
    if target.is_floating_point():
        if tuple(target.shape[1:]) != (classes,):
            raise ValueError(f"probabilities must have shape (N, {classes}), got {tuple(target.shape)}")
        return
    if target.dtype != torch.int64:
        raise TypeError(f"class indices must be int64, got {target.dtype}")
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"class indices must be in 0 to {classes - 1}, got {low} to {high}: leave samples without a label out"
        )


def upcast(value: Tensor) -> Tensor:
    """Upcast half precision, in which the modules would be trained else."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def to_embeddings(
    source: Any, teacher: nn.Module | None, targets: Tensor | None, progress: bool
) -> Embeddings | CachedEmbeddings:
    """Return embeddings from a cache, from a loader and its teacher, or as they are.

    Raises:
        TypeError: ``source`` is of another kind.
    """
    if isinstance(source, Embeddings | CachedEmbeddings):
        return source
    if isinstance(source, TeacherCache):
        return CachedEmbeddings(source, targets)
    if not isinstance(source, Iterable):
        raise TypeError(f"source must be Embeddings, a TeacherCache or a loader, got {type(source).__name__}")
    if teacher is None:
        raise TypeError("a loader of (x, target) needs teacher=, the model that makes the embeddings")
    return collected(outputs(teacher, progress_bar(source, progress, "teacher outputs")))


def collected(batches: Iterable[tuple[Tensor, Tensor | None, Tensor | None]]) -> Embeddings:
    """Gather batches (features, logits, target) on the CPU, in float32 at least."""
    columns: list[list[Tensor | None]] = [[], [], []]
    for batch in batches:
        for column, value in zip(columns, batch, strict=True):
            column.append(_on_cpu(value))
    if not columns[0]:
        raise ValueError("the loader must yield batches, got none")
    features, logits, target = (_joined(column) for column in columns)
    return Embeddings(cast(Tensor, features), logits, target)


def _joined(column: list[Tensor | None]) -> Tensor | None:
    """Concatenate batches, and let go of them, as they are the size of the data."""
    given = [value for value in column if value is not None]
    joined = torch.cat(given) if len(given) == len(column) else None
    column.clear()
    return joined


@torch.no_grad()
def outputs(teacher: nn.Module, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Run a teacher once over a loader of (x, target, ...), in evaluation mode; yield features, logits, target."""
    tap = teacher if isinstance(teacher, FeatureTap) else with_features(teacher)
    device = next((parameter.device for parameter in tap.parameters()), torch.device("cpu"))
    for x, target, *_ in loader:
        with in_mode(tap, training=False):
            logits, features = tap(x.to(device))
        yield features, logits, target


def _on_cpu(value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    return upcast(value.detach().cpu())
