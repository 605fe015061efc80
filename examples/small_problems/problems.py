"""The problems: data in three splits, a teacher's outputs on the training split, the shape of the student.

Whether the student is limited by its capacity or by its data follows from their sizes alone; the reports name which.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from digits import Split, shifted
from digits import splits as digit_splits
from scaffold_target import CLASSES, CLUSTERS, draw_centres, draw_samples
from sklearn.datasets import make_classification
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Problem(NamedTuple):
    """One problem; the student is an MLP of ``widths`` (input, hidden, classes)."""

    name: str
    train: Split
    validation: Split
    test: Split
    teacher_logits: Tensor  # (N, C) on the training split
    teacher_features: Tensor  # (N, F)
    teacher_test: float  # percent
    widths: tuple[int, ...]
    activation: str = "relu"
    batch_size: int = 200
    teacher: nn.Sequential | None = None  # if available, not only its outputs


def scaffold_target(width: int = 12) -> Problem:
    """100 classes of three Gaussian clusters each in 16 dimensions; 6,000 images, the data of scaffold_target.py."""
    generator = torch.Generator().manual_seed(0)
    centres = draw_centres(CLASSES * CLUSTERS, generator)
    splits = [Split(*draw_samples(centres, CLASSES, count, generator)) for count in (6000, 3000, 10000)]
    return _with_teacher(f"scaffold_target, {width} units", splits, (256, 128), (width,), passes=24)


def digits(width: int = 4) -> Problem:
    """scikit-learn's digits, 898 training images, which four units overfit."""
    return _with_teacher(
        "digits", [*digit_splits().values()], (256, 128), (width,), passes=40, activation="gelu", batch_size=100
    )


def shifted_digits(width: int = 4) -> Problem:
    """The digits under all nine shifts of at most one pixel, in every split: too much for four units."""
    splits = [shifted(split) for split in digit_splits().values()]
    return _with_teacher("digits, shifted", splits, (256, 128), (width,), passes=40, activation="gelu", batch_size=100)


def clusters(width: int = 5) -> Problem:
    """20 classes of four clusters each in 20 dimensions, 20,000 samples: a problem on which nothing was selected."""
    x, y = make_classification(
        40_000, 20, n_informative=12, n_redundant=4, n_classes=20, n_clusters_per_class=4, class_sep=2.0, random_state=5
    )
    return _with_teacher("clusters (new)", _cut(x, y, (20_000, 8_000)), (256, 128), (width,), passes=10)


def uneven_clusters(width: int = 5) -> Problem:
    """As ``clusters``, but each class is rarer than the one before, the last 20 times rarer than the first."""
    weights = np.geomspace(1, 1 / 20, 20)
    x, y = make_classification(
        40_000,
        20,
        n_informative=12,
        n_redundant=4,
        n_classes=20,
        n_clusters_per_class=4,
        weights=weights / weights.sum(),
        flip_y=0,  # flipped labels would make up 6 % of the rarest class
        class_sep=2.0,
        random_state=7,
    )
    return _with_teacher(f"uneven clusters {width} (new)", _cut(x, y, (20_000, 8_000)), (256, 128), (width,), passes=10)


def few_samples(width: int = 24) -> Problem:
    """10 classes in 30 dimensions, 400 training samples: a problem on which nothing was selected."""
    x, y = make_classification(
        6_000, 30, n_informative=15, n_redundant=5, n_classes=10, class_sep=1.5, flip_y=0.05, random_state=6
    )
    splits = _cut(x, y, (400, 1_600))
    return _with_teacher("few samples (new)", splits, (256, 128), (width,), passes=40, batch_size=50)


def pixels(folder: Path, width: int = 8) -> Problem:
    """CIFAR-100 at 16 x 16, its first 128 principal components, into ``width`` units; the teacher is a ResNet10-l.

    ``folder`` holds the file of ``pixels.write``.

    Raises:
        FileNotFoundError: it is missing.
    """
    path = folder / "pixels.pt"
    if not path.exists():
        raise FileNotFoundError(f"expected {path}, got none: gain.py writes it, given --data and --teacher")
    kept = torch.load(path, weights_only=True)
    splits = [Split(*kept[name]) for name in ("train", "validation", "test")]
    return Problem(
        f"CIFAR-100 pixels, {width} units",
        *splits,
        kept["teacher_logits"].float(),
        kept["teacher_features"].float(),
        kept["teacher_test"],
        (128, width, 100),
    )


def mlp(widths: tuple[int, ...], activation: str) -> nn.Sequential:
    """Linear layers of these widths with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Return the accuracy, percent."""
    return 100 * (logits.argmax(-1) == y).float().mean().item()


def _with_teacher(
    name: str,
    splits: list[Split],
    hidden: tuple[int, ...],
    student: tuple[int, ...],
    *,
    passes: int,
    activation: str = "relu",
    batch_size: int = 200,
) -> Problem:
    """Train the teacher with cross-entropy: SGD .1, momentum .9, cosine."""
    train, validation, test = splits
    ends = train.x.shape[1], int(train.y.max()) + 1
    torch.manual_seed(0)
    teacher = mlp((ends[0], *hidden, ends[1]), "relu")
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        for index in torch.randperm(len(train.y), generator=generator).split(batch_size):
            loss = F.cross_entropy(teacher(train.x[index]), train.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        features = teacher[:-1](train.x)
        logits, on_test = teacher[-1](features), accuracy(teacher(test.x), test.y)
    widths = (ends[0], *student, ends[1])
    outputs = logits, features, on_test
    return Problem(name, train, validation, test, *outputs, widths, activation, batch_size, teacher)


def _cut(x, y, counts: tuple[int, int]) -> list[Split]:
    """Split arrays into training, validation and, the rest, test."""
    x = torch.from_numpy(x).float()
    x, y = (x - x.mean(0)) / x.std(0), torch.from_numpy(y).long()
    sizes = [*counts, len(y) - sum(counts)]
    return [Split(*part) for part in zip(x.split(sizes), y.split(sizes), strict=True)]
