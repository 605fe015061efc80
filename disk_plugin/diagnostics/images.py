"""The images that the guide discounts most."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from . import tables
from .plots import Names, class_name, new_figure, period

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


def gallery(
    table: "DataFrame", images: Any, *, count: int = 36, epoch: int | None = None, names: Names = None
) -> "Figure":
    r"""Show the images with the largest discount, the largest first; misclassified ones have a red title.

    Args:
        table: result of ``SampleRecord.table`` or ``read``.
        images: a tensor of all images, or the dataset itself: ``images[i]`` is that of sample i, or a tuple that begins
            with it. Tensors are uint8, or floating-point in [0, 1]; other ranges are rescaled.
        count: number of images, >= 1.
        epoch: the epoch to show; None for each sample's mean over the recorded ones.
        names: class names for the titles, by class index; None for the index itself.

    Shape:
        images[i] (H, W), (1, H, W) or (3, H, W); other types than tensors as in matplotlib's ``imshow``.

    Returns:
        A figure with one panel for each image, titled by its class, if the target was recorded, and its discount.

    Raises:
        ValueError: fewer images than recorded samples; ``count`` < 1; no row, or none of this epoch; columns are
            missing; a class without a name; an image of another shape.
        TypeError: ``table`` is not a DataFrame, ``count`` or ``epoch`` not an int.
        ImportError: pandas or matplotlib is absent; the message holds the pip line.

    Examples:
        >>> import pandas, torch
        >>> from disk_plugin.diagnostics import gallery
        >>> table = pandas.DataFrame({"index": [0, 1], "epoch": 0, "guide": [0.8, 0.4], "discount": [0.5, 0.9]})
        >>> figure = gallery(table.assign(ce=1.0, correct=True, target=[1, 0]), torch.rand(2, 3, 8, 8), count=1)
        >>> figure.axes[0].get_title()
        '0\n0.90'
    """
    _checks.integer("count", count, at_least=1)
    rows = tables.select_rows(table, epoch)
    size = tables.get_size(rows)
    if len(images) < size:
        raise ValueError(f"images must hold every recorded sample, at least {size}, got {len(images)}")
    samples = tables.per_sample(rows).sort_values("discount", ascending=False, kind="stable").head(count)
    labels = rows.groupby("index")["target"].first() if "target" in rows else None
    across = math.ceil(math.sqrt(len(samples)))
    down = math.ceil(len(samples) / across)
    figure = new_figure(max(4, 1.4 * across), 0.5 + 1.6 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, (index, sample) in zip(panels, samples.iterrows(), strict=False):
        _show(axes, images[index])
        title = "" if labels is None else f"{class_name(names, labels[index])}\n"
        axes.set_title(f"{title}{sample['discount']:.2f}", size=8, color="black" if sample["correct"] >= 0.5 else "red")
    figure.suptitle(f"largest discount, {period(table, epoch)}")
    return figure


def _show(axes: "Axes", image: Any) -> None:
    """Draw an image, or the first entry of a tuple, with black at 0 and white at 1."""
    image = image[0] if isinstance(image, (tuple, list)) else image
    if not isinstance(image, Tensor):
        axes.imshow(image, cmap="gray")
        return
    if image.ndim not in {2, 3} or (image.ndim == 3 and image.shape[0] not in {1, 3}):
        raise ValueError(f"an image must have shape (H, W), (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    image = image.detach().cpu() / 255 if image.dtype == torch.uint8 else image.detach().cpu().float()
    low, high = image.aminmax()
    if low < 0 or high > 1:
        image = (image - low) / (high - low).clamp(min=1e-6)
    image = image.permute(1, 2, 0) if image.ndim == 3 else image
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
