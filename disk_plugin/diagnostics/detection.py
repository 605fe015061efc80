"""DiSK's per-sample quantities as label-error detectors."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import tables

if TYPE_CHECKING:
    from pandas import DataFrame


def detection_auroc(table: "DataFrame", flipped: Tensor, *, epoch: int | None = None) -> dict[str, float]:
    """Score each recorded quantity as a label-error detector, by the area under its ROC curve.

    That is the probability that a random flipped sample has a larger value than a random clean one (ties count one
    half): 1 ranks all flipped samples on top, 0.5 is chance. The baselines, which need no guide, are ``ce`` and
    ``1 - correct``, the share of epochs in which the student was wrong.

    Args:
        table: result of ``SampleRecord.table`` or ``read``, with any samples of the dataset.
        flipped: whether the label is wrong, for every index of the dataset.
        epoch: the epoch to score; None for each sample's mean over the recorded ones. For some of these pass only their
            rows, ``table[table["epoch"] >= 10]``.

    Shape:
        flipped (N_dataset,), bool.

    Returns:
        The score of ``guide``, ``1 - guide``, ``discount``, ``ce``, ``1 - correct`` and the extras (larger means
        wrong); NaN if a value is NaN (``table.dropna()`` drops such rows).

    Raises:
        ValueError: ``flipped`` is too short, or the recorded samples are all flipped or all clean; no row, or none of
            this epoch; columns are missing.
        TypeError: ``flipped`` is not a bool tensor, ``table`` not a DataFrame, ``epoch`` not an int.
        ImportError: pandas is absent; the message holds the pip line.

    Examples:
        >>> import pandas, torch
        >>> from disk_plugin.diagnostics import detection_auroc
        >>> table = pandas.DataFrame({"index": [0, 1], "epoch": 0, "guide": [0.9, 0.2], "discount": [0.1, 0.8]})
        >>> scores = detection_auroc(table.assign(ce=[0.5, 0.5], correct=True), torch.tensor([False, True]))
        >>> scores["discount"], scores["guide"], scores["ce"]
        (1.0, 0.0, 0.5)
    """
    rows = tables.select_rows(table, epoch)
    samples = tables.per_sample(rows)
    flags = _flags(flipped, tables.get_size(rows))[torch.tensor(samples.index.to_numpy())]
    if flags.all() or not flags.any():
        raise ValueError(
            f"flipped must be True for some recorded samples and False for others, got all {bool(flags[0])}"
        )
    # -g ranks like 1 - g, without its ties among the smallest g
    finders = {"guide": samples["guide"], "1 - guide": -samples["guide"], "discount": samples["discount"]}
    finders |= {"ce": samples["ce"], "1 - correct": -samples["correct"]}
    finders |= {name: samples[name] for name in samples.columns if name not in tables.DTYPES}
    return {name: _auroc(torch.tensor(values.to_numpy()), flags) for name, values in finders.items()}


def _flags(flipped: Tensor, size: int) -> Tensor:
    """Validate flags (N,), N >= ``size``."""
    if not isinstance(flipped, Tensor) or flipped.dtype != torch.bool:
        came = flipped.dtype if isinstance(flipped, Tensor) else type(flipped).__name__
        raise TypeError(f"flipped must be a bool Tensor, got {came}")
    if flipped.ndim != 1 or len(flipped) < size:
        raise ValueError(f"flipped must have shape (N,) with N >= {size}, got {tuple(flipped.shape)}")
    return flipped.cpu()


def _auroc(score: Tensor, positive: Tensor) -> float:
    """Return the share of pairs in which the positive sample scores higher, ties counting one half."""
    if score.isnan().any():
        return float("nan")
    negatives = score[~positive].sort().values
    below = torch.searchsorted(negatives, score[positive])  # (positives,) negatives with a smaller score
    not_above = torch.searchsorted(negatives, score[positive], right=True)
    return float((below + not_above).double().mean() / (2 * len(negatives)))
