"""The problems of the map: a synthetic family, scikit-learn's digits with and without shifts, CIFAR-100's pixels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import digits
import torch
from scaffold_target import draw_centres, draw_samples
from small_images import data
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .stacked import Batch, Stack, cross_entropy, fit

HELD_OUT = 4000  # fresh samples for the selection of settings, and as many for the result
CIFAR_SIDE, CIFAR_COMPONENTS = 16, 128


class Split(NamedTuple):
    """Samples of each seed: x (S, N, D), y (S, N)."""

    x: Tensor
    y: Tensor


class Problem(NamedTuple):
    """Data, the teacher's outputs on the training part, and the students' training settings."""

    name: str
    train: Batch
    validation: Split
    test: Split
    teacher: dict[str, Tensor]  # accuracy on "train" and "test", (S,)
    num_classes: int
    activation: Callable[[Tensor], Tensor]
    passes: int
    batch_size: int
    seeds: Sequence[int]


def passes_of(images: int) -> int:
    """Return the number of passes, more over fewer images: 16 at 10,000, 92 at 300."""
    return round(16 * (10_000 / images) ** 0.5)


def synthetic(classes: int, clusters: int, images: int, seeds: Sequence[int], *, dry_run: bool = False) -> Problem:
    """Gaussian clusters in 16 dimensions, assigned to the classes; each seed has its own centres and samples."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "validation": [], "test": []}
    held_out = 200 if dry_run else HELD_OUT
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        centres = draw_centres(classes * clusters, generator)
        for name, count in {"train": images, "validation": held_out, "test": held_out}.items():
            parts[name].append(draw_samples(centres, classes, count, generator))
    splits = {name: Split(*map(torch.stack, zip(*pairs, strict=True))) for name, pairs in parts.items()}
    passes = 2 if dry_run else passes_of(images)
    name = f"{classes} classes x {clusters} clusters"
    return _with_teacher(name, splits, (256, 128), classes, torch.relu, passes, 100 if images < 2000 else 200, seeds)


def digit_images(seeds: Sequence[int], *, shifted: bool, dry_run: bool = False) -> Problem:
    """scikit-learn's digits; shifts by up to one pixel make them nine times as many and harder."""
    splits = {}
    for name, split in digits.splits().items():
        x, y = digits.shifted(split) if shifted else split
        splits[name] = Split(x.expand(len(seeds), *x.shape), y.expand(len(seeds), -1))
    passes = 2 if dry_run else 30 if shifted else 120
    name = "digits, shifted" if shifted else "digits"
    return _with_teacher(name, splits, (256, 128), digits.NUM_CLASSES, F.gelu, passes, 100, seeds)


def cifar_pixels(path: Path | None, seeds: Sequence[int], *, dry_run: bool = False) -> Problem:
    """CIFAR-100 at 16 x 16 pixels, as principal components; 5,000 training images are for validation."""
    whole = data.synthetic() if path is None else data.load(path)
    images = [F.adaptive_avg_pool2d(split.images.float() / 255, CIFAR_SIDE).flatten(1) for split in whole]
    mean = images[0].mean(0)
    torch.manual_seed(0)  # of pca_lowrank
    _, spread, basis = torch.pca_lowrank(images[0] - mean, CIFAR_COMPONENTS, center=False, niter=4)
    x, test = ((part - mean) @ basis * (len(images[0]) ** 0.5 / spread[0]) for part in images)
    rows = dict(zip(("train", "validation"), data.search_split(len(x), len(x) // 10), strict=True))
    splits = {name: Split(x[index], whole[0].labels[index]) for name, index in rows.items()}
    splits["test"] = Split(test, whole[1].labels)
    splits = {
        name: Split(*(value.expand(len(seeds), *value.shape) for value in split)) for name, split in splits.items()
    }
    passes = 2 if dry_run else 10
    return _with_teacher("CIFAR-100 pixels", splits, (1024, 512), 100, torch.relu, passes, 200, seeds, shared=True)


def _with_teacher(name, splits, hidden, classes, activation, passes, batch_size, seeds, *, shared=False) -> Problem:
    """Train a teacher per seed, or one for all, with cross-entropy, for as many passes as a student."""
    x, y = splits["train"]
    own = seeds[:1] if shared else seeds
    teacher = Stack.fresh((x.shape[-1], *hidden, classes), [10_000 + seed for seed in own], torch.relu)
    none = torch.zeros(len(own), y.shape[1], 0)
    labelled = Batch(x[: len(own)], y[: len(own)], none, none)
    fit(
        teacher.parameters,
        lambda batch: cross_entropy(teacher, batch),
        labelled,
        passes=passes,
        batch_size=batch_size,
        seeds=own,
    )
    accuracy = {part: teacher.accuracy(*(v[: len(own)] for v in splits[part]))[0] for part in ("train", "test")}
    logits, features = (value[0].expand(len(seeds), -1, -1) for value in teacher.outputs(labelled.x))
    accuracy = {part: value.expand(len(seeds)) for part, value in accuracy.items()}
    train = Batch(x, y, logits, features)
    return Problem(
        name, train, splits["validation"], splits["test"], accuracy, classes, activation, passes, batch_size, seeds
    )
