"""Tables of recorded samples: files, validation, and means per sample."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _checks
from ._extra import extra

if TYPE_CHECKING:
    from pandas import DataFrame

DTYPES = {
    "index": "int64",
    "epoch": "int32",
    "target": "int32",
    "guide": "float32",
    "discount": "float32",
    "ce": "float32",
    "correct": "bool",
}
COLUMNS = [name for name in DTYPES if name != "target"]  # of every table


def read(path: str | Path) -> "DataFrame":
    """Read a file of ``SampleRecord.write``, with the same dtypes; floats of a .csv become float32.

    Args:
        path: ends in .parquet or .csv.

    Raises:
        ValueError: another suffix, or columns are missing.
        ImportError: pandas, or pyarrow for .parquet, is absent; the message holds the pip line.

    Examples:
        >>> import pathlib, tempfile
        >>> from disk_plugin.diagnostics import SampleRecord, read
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SampleRecord().write(pathlib.Path(folder, "samples.csv"))
        ...     list(read(pathlib.Path(folder, "samples.csv")).columns)
        ['index', 'epoch', 'guide', 'discount', 'ce', 'correct']
    """
    suffix, pandas = _suffix(path), extra("pandas")
    if suffix == ".parquet":
        extra("pyarrow")
        return _with_columns(pandas.read_parquet(path, engine="pyarrow"))
    table = _with_columns(pandas.read_csv(path))
    floats = dict.fromkeys(table.select_dtypes("float64").columns, "float32")
    return table.astype(floats | {name: dtype for name, dtype in DTYPES.items() if name in table})


def write(table: "DataFrame", path: str | Path) -> None:
    """Write a table as Parquet or CSV, by the suffix of ``path``."""
    if _suffix(path) == ".csv":
        table.to_csv(path, index=False)
        return
    extra("pyarrow")
    table.to_parquet(path, engine="pyarrow", index=False)


def select_rows(table: "DataFrame", epoch: int | None, *more: str) -> "DataFrame":
    """Return the rows of an epoch, or all for None, after validating that the table has rows and the columns."""
    if not isinstance(table, extra("pandas").DataFrame):
        raise TypeError(f"table must be a pandas.DataFrame, got {type(table).__name__}")
    table = _with_columns(table, *more)
    if table.empty:
        raise ValueError("table must hold at least one row, got none")
    if epoch is None:
        return table
    _checks.integer("epoch", epoch, at_least=0)
    rows = table[table["epoch"] == epoch]
    if rows.empty:
        raise ValueError(f"epoch must be one of the recorded {sorted(set(table['epoch'].tolist()))}, got {epoch}")
    return rows


def per_sample(rows: "DataFrame") -> "DataFrame":
    """Return each sample's means over its rows in float64, by index, for numeric columns; NaN propagates."""
    values = rows.drop(columns=["index", "epoch", "target"], errors="ignore")
    values = values.select_dtypes(["number", "bool"]).astype("float64")
    samples, unknown = values.groupby(rows["index"]), values.isna().groupby(rows["index"])
    return samples.mean().mask(unknown.any())


def get_size(rows: "DataFrame") -> int:
    """Return a lower bound of the dataset's size."""
    if rows["index"].min() < 0:
        raise ValueError(f"index must be >= 0, got {rows['index'].min()}")
    return int(rows["index"].max()) + 1


def _suffix(path: Any) -> str:
    """Return .parquet or .csv."""
    suffix = Path(path).suffix
    if suffix not in {".parquet", ".csv"}:
        raise ValueError(f"path must end in .parquet or .csv, got {str(path)!r}")
    return suffix


def _with_columns(table: "DataFrame", *more: str) -> "DataFrame":
    """Validate the columns that are always recorded and ``more``; float16 becomes float32."""
    expected = [*COLUMNS, *more]
    if not set(expected) <= set(table.columns):
        hint = ": record.add(..., target=target) records the target" if "target" in more else ""
        raise ValueError(f"table must have the columns {expected}, got {list(table.columns)}{hint}")
    narrow = table.select_dtypes("float16").columns  # pandas has no quantiles of float16
    return table.astype(dict.fromkeys(narrow, "float32")) if len(narrow) else table
