"""Per-sample record of DiSK's quantities, collected in training."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from ..features.guided import GuidedTerms
from ..functional import DiSKTerms
from . import tables
from ._extra import extra

if TYPE_CHECKING:
    from pandas import DataFrame

DTYPES = {name: getattr(torch, dtype) for name, dtype in tables.DTYPES.items()}


class SampleRecord:
    """One row per sample and epoch: g, discount, CE and correctness, collected from any training loop.

    ``add`` copies its inputs on their device, without synchronizing. An epoch's rows move to the CPU with the first
    batch of another epoch, or when they are read. A row takes 25 bytes, plus 4 for a target and 4 per floating-point
    extra, whatever the precision of the training.

    Pass ``target`` to ``add`` to leave out ignored targets; without it they stay, with g, discount, CE and correct 0.
    Each rank records its own samples: write one file each and join the tables with ``pandas.concat``.

    Args:
        ignore_index: target value that is ignored, as in ``DiSKLoss``.

    Raises:
        TypeError: ``ignore_index`` is not an int.

    Examples:
        >>> import torch
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> disk, record, target = DiSKLoss(GuideHead(3)), SampleRecord(), torch.tensor([0, 1, 0])
        >>> terms = disk.terms(torch.eye(3), torch.eye(3), target, reduction="none")
        >>> record.add(torch.arange(3), 0, terms, target=target)
        >>> record.table()["correct"].tolist()
        [True, True, False]
    """

    def __init__(self, *, ignore_index: int = -100) -> None:
        _checks.integer("ignore_index", ignore_index)
        self.ignore_index = int(ignore_index)
        self._batches: list[dict[str, Tensor]] = []  # of one epoch, on the device
        self._epoch: int | None = None  # of those batches
        self._parts: list[dict[str, Tensor]] = []  # of earlier epochs, on the CPU

    def add(
        self,
        index: Tensor,
        epoch: int,
        terms: DiSKTerms | GuidedTerms,
        *,
        target: Tensor | None = None,
        **extras: Tensor,
    ) -> None:
        """Add a batch's terms, evaluated with ``reduction="none"``; a batch that raises leaves the record unchanged.

        Dense prediction gives one row per target (pixel). With ``index`` (N,) these share their sample's index, and
        figures show their mean per sample; with (N, d1, ...) each has its own.

        Args:
            index: index of each sample in the dataset, int64, >= 0; the loader has to yield it.
            epoch: whole epochs, counted from 0.
            terms: result of ``DiSKLoss.terms``, ``Guided.terms`` or ``guided_feature_terms``; their ``ce`` includes the
                sample weight.
            target: class indices, or probabilities (recorded as their argmax).
            **extras: further columns by name, such as ``teacher_ce=...`` or ``distill=terms.distill``; floating-point
                values are kept as float32, integers as int64. Every batch must have the same columns.

        Shape:
            terms (N,) or (N, d1, ...); index and extras (N,) or the terms'; target the terms', or with its classes
            (N, C) or (N, C, d1, ...).

        Raises:
            ValueError: terms reduced to scalars, shapes that do not fit, ``epoch`` < 0, an extra with the name of a
                column, columns other than those of earlier batches.
            TypeError: terms, tensors or ``epoch`` of another type.
        """
        _checks.integer("epoch", epoch, at_least=0)
        disk = _per_position(terms)
        shape = tuple(disk.guide.shape)
        batch = {"index": _column("index", _indices("index", index), shape)}
        batch["epoch"] = torch.full_like(batch["index"], epoch, dtype=DTYPES["epoch"])
        if target is not None:
            batch["target"] = _column("target", _label(target), shape, DTYPES["target"])
        for name in ("guide", "discount", "ce", "correct"):
            batch[name] = _column(name, getattr(disk, name), shape, DTYPES[name])
        for name, value in extras.items():
            if name in DTYPES:
                raise ValueError(f"extras must not have the name of a column {list(DTYPES)}, got {name!r}")
            batch[name] = _column(name, value, shape)
        self._check_columns(batch)
        if epoch != self._epoch:
            self._to_cpu()
        self._batches.append(batch)
        self._epoch = epoch

    def state_dict(self) -> dict[str, Tensor]:
        """Return all rows as one CPU tensor per column, empty if there are none; later batches do not change them."""
        self._to_cpu()
        return _joined(self._parts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the recorded rows by copies of those of ``state_dict()``.

        Floating-point columns may have another precision; they are kept as float32.

        Raises:
            RuntimeError: ``state`` does not hold the columns as tensors (rows,) of one length, or holds integers as
                floating-point numbers, which may have been rounded.
        """
        if state and not _is_whole(state):
            came = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in state.items()}
            raise RuntimeError(f"expected a state with {tables.COLUMNS}, tensors (rows,) of one length, got {came}")
        part = {name: _restored(name, value) for name, value in state.items()}
        self._batches, self._epoch = [], None
        self._parts = [part] if part else []

    def table(self) -> "DataFrame":
        """Return the rows, one per sample and epoch, in the order of recording.

        Returns:
            Columns ``index`` (int64), ``epoch`` (int32), ``target`` (int32, if recorded), ``guide``, ``discount``,
            ``ce`` in nats (float32), ``correct`` (bool), then the extras.

        Raises:
            ImportError: pandas is absent; the message holds the pip line.
        """
        columns = self.state_dict() or {name: torch.empty(0, dtype=DTYPES[name]) for name in tables.COLUMNS}
        return extra("pandas").DataFrame({name: column.numpy() for name, column in columns.items()})

    def write(self, path: str | Path) -> None:
        """Write ``table()`` to ``path``, whose suffix is .parquet or .csv; ``read`` restores it.

        Raises:
            ValueError: another suffix.
            ImportError: pandas, or pyarrow for .parquet, is absent; the message holds the pip line.
        """
        tables.write(self.table(), path)

    def _check_columns(self, batch: dict[str, Tensor]) -> None:
        """Raise ValueError if a batch's columns or their dtypes differ from earlier ones."""
        first = [*self._parts[:1], *self._batches[:1], batch][0]
        expected, came = ({name: column.dtype for name, column in each.items()} for each in (first, batch))
        if came != expected:
            raise ValueError(f"every batch must bring the columns of the first {expected}, got {came}")

    def _to_cpu(self) -> None:
        """Move the epoch's batches to the CPU as one part, without ignored targets."""
        if not self._batches:
            return
        part = {name: column.to("cpu") for name, column in _joined(self._batches).items()}
        if "target" in part:
            kept = part["target"] != self.ignore_index
            part = {name: column[kept] for name, column in part.items()}
        self._parts.append(part)
        self._batches = []


def _per_position(terms: DiSKTerms | GuidedTerms) -> DiSKTerms:
    """Return DiSK's terms; validate that they are per target."""
    disk = terms.disk if isinstance(terms, GuidedTerms) else terms
    if not isinstance(disk, DiSKTerms):
        raise TypeError(f"terms must be DiSKTerms or GuidedTerms, got {type(terms).__name__}")
    if not disk.guide.ndim:
        raise ValueError('terms must be evaluated with reduction="none", one value per sample, got scalars')
    return disk


def _is_whole(state: Mapping[str, Tensor]) -> bool:
    """Return whether all columns are there, of one length."""
    if not all(isinstance(column, Tensor) and column.ndim == 1 for column in state.values()):
        return False
    return state.keys() >= set(tables.COLUMNS) and len({len(column) for column in state.values()}) == 1


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate rows, in new tensors."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _column(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return a detached copy with one value per target, flattened, on the same device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    if tuple(value.shape) not in {shape, shape[:1]}:
        expected = " or ".join(str(each) for each in dict.fromkeys((shape[:1], shape)))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    value = value.detach().reshape(*value.shape, *[1] * (len(shape) - value.ndim))
    return value.expand(shape).flatten().to(dtype or _kept_as(value), copy=True)


def _kept_as(value: Tensor) -> torch.dtype:
    """Return the dtype in which an extra is kept."""
    if value.is_floating_point():
        return torch.float32
    return torch.bool if value.dtype == torch.bool else torch.int64


def _restored(name: str, value: Tensor) -> Tensor:
    """Return a column of a state in its recorded dtype, on the CPU."""
    dtype = DTYPES.get(name, _kept_as(value))
    if value.is_floating_point() and not dtype.is_floating_point:
        raise RuntimeError(f"expected {name} as {dtype}, got {value.dtype}, which may have rounded it")
    return value.detach().to("cpu", dtype, copy=True)


def _indices(name: str, value: Tensor) -> Tensor:
    """Raise TypeError if not int64: a narrower dtype may have wrapped around already."""
    if isinstance(value, Tensor) and value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    return value


def _label(target: Tensor) -> Tensor:
    """Return class indices as they are, probabilities as their argmax along dimension 1."""
    if isinstance(target, Tensor) and target.is_floating_point():
        if target.ndim < 2:
            came = f"{target.dtype} of shape {tuple(target.shape)}: call target.long() if these are class indices"
            raise TypeError(f"target must be int64 class indices or probabilities (N, C), got {came}")
        return target.argmax(1)
    return _indices("target", target)
