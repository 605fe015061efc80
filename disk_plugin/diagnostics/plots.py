"""Figures of recorded samples: g and discount over epochs, against CE and per class.

They are matplotlib ``Figure`` objects made without pyplot: call ``figure.savefig(path)``, or end a notebook cell with
one.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import tables
from ._extra import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Names = Sequence[str] | Mapping[int, str] | None
LABELS = {"guide": "guide g", "discount": "discount"}
COLORS = {"right": "tab:blue", "wrong": "tab:red"}
CE_GROUPS = 20
READABLE_CLASSES = 120  # more names do not fit on an axis


def plot_over_epochs(table: "DataFrame") -> "Figure":
    """Draw the means of g and discount over epochs: of all samples (and their middle 80 %), correct and incorrect.

    Args:
        table: result of ``SampleRecord.table`` or ``read``.

    Returns:
        A figure with a panel for g and one for the discount.

    Raises:
        ValueError: no row, or columns are missing.
        TypeError: ``table`` is not a DataFrame.
        ImportError: pandas or matplotlib is absent; the message holds the pip line.

    Examples:
        >>> import pandas
        >>> from disk_plugin.diagnostics import plot_over_epochs
        >>> table = pandas.DataFrame({"index": 0, "epoch": [0, 1], "guide": [0.4, 0.8], "discount": [0.5, 0.9]})
        >>> figure = plot_over_epochs(table.assign(ce=[1.2, 0.3], correct=[False, True]))
        >>> figure.axes[0].get_xlabel()
        'epoch'
    """
    rows = tables.select_rows(table, None)
    figure = new_figure(9, 3.2)
    for axes, (name, label) in zip(figure.subplots(1, 2), LABELS.items(), strict=True):
        by_epoch = rows.groupby("epoch")[name]
        low, high = by_epoch.quantile(0.1), by_epoch.quantile(0.9)
        axes.fill_between(low.index, low, high, color="black", alpha=0.12, linewidth=0, label="all, middle 80 %")
        axes.plot(low.index, by_epoch.mean(), ".-", color="black", label="all, mean")
        for outcome, part in _by_outcome(rows).items():
            means = part.groupby("epoch")[name].mean()
            axes.plot(means.index, means, ".-", color=COLORS[outcome], label=f"{outcome}, mean")
        axes.set(xlabel="epoch", ylabel=label, ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    return figure


def plot_against_ce(table: "DataFrame", *, epoch: int | None = None) -> "Figure":
    """Draw g and discount of each sample against its cross-entropy, correct and incorrect samples separately.

    The line is the mean over 20 equally large groups of samples with neighbouring CE.

    Args:
        table: result of ``SampleRecord.table`` or ``read``.
        epoch: the epoch to show; None for each sample's mean over the recorded ones, correct if it was so in at least
            half of them.

    Returns:
        A figure with a panel for g and one for the discount.

    Raises:
        ValueError: no row, or none of this epoch; columns are missing.
        TypeError: ``table`` is not a DataFrame, ``epoch`` not an int.
        ImportError: pandas or matplotlib is absent; the message holds the pip line.

    Examples:
        >>> import pandas
        >>> from disk_plugin.diagnostics import plot_against_ce
        >>> table = pandas.DataFrame({"index": [0, 1], "epoch": 0, "guide": [0.8, 0.4], "discount": [0.5, 0.9]})
        >>> figure = plot_against_ce(table.assign(ce=[0.3, 1.2], correct=[True, False]), epoch=0)
        >>> figure.axes[0].get_xlabel()
        'cross-entropy (nats)'
    """
    samples = tables.per_sample(tables.select_rows(table, epoch))
    group = (samples["ce"].rank(method="first") - 1) * CE_GROUPS // len(samples)
    means = samples.groupby(group)[["ce", *LABELS]].mean()
    figure = new_figure(9, 3.6)
    for axes, (name, label) in zip(figure.subplots(1, 2), LABELS.items(), strict=True):
        for outcome, part in _by_outcome(samples).items():
            axes.scatter(part["ce"], part[name], s=6, alpha=0.4, c=COLORS[outcome], label=outcome, rasterized=True)
        axes.plot(means["ce"], means[name], color="black", label="mean")
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set(xlabel="cross-entropy (nats)", ylabel=label, ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    figure.suptitle(period(table, epoch))
    return figure


def plot_per_class(table: "DataFrame", *, epoch: int | None = None, names: Names = None) -> "Figure":
    """Draw the class means of g and discount, from small to large discount.

    Args:
        table: result of ``SampleRecord.table`` or ``read``, recorded with the target.
        epoch: the epoch to show; None for the mean over the recorded ones.
        names: class names, by class index; None for the index itself.

    Returns:
        A figure with a panel for g and one for the discount, the classes in the same order.

    Raises:
        ValueError: no row, or none of this epoch; columns are missing, ``target`` included; a class without a name.
        TypeError: ``table`` is not a DataFrame, ``epoch`` not an int.
        ImportError: pandas or matplotlib is absent; the message holds the pip line.

    Examples:
        >>> import pandas
        >>> from disk_plugin.diagnostics import plot_per_class
        >>> table = pandas.DataFrame({"index": [0, 1], "epoch": 0, "guide": [0.8, 0.4], "discount": [0.5, 0.9]})
        >>> figure = plot_per_class(table.assign(ce=1.0, correct=True, target=[1, 0]), names=["cat", "dog"])
        >>> [label.get_text() for label in figure.axes[1].get_xticklabels()]
        ['dog', 'cat']
    """
    rows = tables.select_rows(table, epoch, "target")
    means = rows.groupby("target")[list(LABELS)].mean().sort_values("discount", kind="stable")
    ticks = [class_name(names, label) for label in means.index]
    figure = new_figure(min(16, 3 + 0.25 * len(means)), 5)
    for axes, (name, label) in zip(figure.subplots(2, 1, sharex=True), LABELS.items(), strict=True):
        axes.bar(range(len(means)), means[name], color="tab:gray")
        axes.set(ylabel=f"{label}, mean", ylim=(0, 1))
    axes.set_xlabel("class")
    if len(means) <= READABLE_CLASSES:
        axes.set_xticks(range(len(means)), ticks, rotation=90, size=7)
    else:
        axes.set_xlabel("class, by rank of its discount")
    figure.suptitle(period(table, epoch))
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, in inches, without pyplot state."""
    figure: Figure = extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def class_name(names: Names, label: int) -> str:
    """Return the name of a class, or its index if there are no names."""
    if names is None:
        return str(label)
    if label not in (names if isinstance(names, Mapping) else range(len(names))):
        raise ValueError(f"names must have one for class {label}, got {len(names)} names")
    return str(names[label])


def period(table: "DataFrame", epoch: int | None) -> str:
    """Describe the epochs that a figure shows."""
    first, last = (table["epoch"].min(), table["epoch"].max()) if epoch is None else (epoch, epoch)
    return f"epoch {first}" if first == last else f"mean over epochs {first} to {last}"


def _by_outcome(rows: "DataFrame") -> dict[str, "DataFrame"]:
    """Split rows into correct and incorrect; a mean over epochs counts as correct from one half on."""
    right = rows["correct"].astype("float64") >= 0.5
    return {"right": rows[right], "wrong": rows[~right]}
