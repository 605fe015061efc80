"""The small real problem that the examples share: scikit-learn's handwritten digits, a teacher and a tiny student.

1,797 images of 8 x 8 pixels ship with scikit-learn: nothing is downloaded. The teacher is an MLP that is nearly
perfect; the student has four hidden units, a real capacity gap.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

NUM_CLASSES = 10
STUDENT_WIDTH = 4
BATCH_SIZE = 100


class Split(NamedTuple):
    """Images (N, 64) in [0, 1] and labels (N,) of one split."""

    x: Tensor
    y: Tensor


def splits() -> dict[str, Split]:
    """Return the fixed train (50 %), validation (20 %) and test (30 %) splits, stratified by class."""
    digits = load_digits()
    x, y = digits.data.astype("float32") / 16, digits.target
    x_rest, x_test, y_rest, y_test = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)
    x_train, x_validation, y_train, y_validation = train_test_split(
        x_rest, y_rest, test_size=2 / 7, stratify=y_rest, random_state=0
    )
    parts = {
        "train": (x_train, y_train),
        "validation": (x_validation, y_validation),
        "test": (x_test, y_test),
    }
    return {name: Split(torch.from_numpy(x), torch.from_numpy(y).long()) for name, (x, y) in parts.items()}


def shifted(split: Split) -> Split:
    """Return every image under all nine shifts of at most one pixel."""
    padded = F.pad(split.x.view(-1, 8, 8), [1] * 4)
    moved = [padded[:, row : row + 8, column : column + 8].flatten(1) for row in range(3) for column in range(3)]
    return Split(torch.cat(moved), split.y.repeat(9))


def make_teacher() -> nn.Module:
    """64-256-128-10 MLP."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, NUM_CLASSES)
    )


def make_student() -> nn.Module:
    """64-4-10 MLP: 310 parameters; GELU, as a dead ReLU would cost it a quarter of its width."""
    return nn.Sequential(nn.Linear(64, STUDENT_WIDTH), nn.GELU(), nn.Linear(STUDENT_WIDTH, NUM_CLASSES))


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the accuracy on the split, percent."""
    model.eval()
    with torch.no_grad():
        right = (model(split.x).argmax(1) == split.y).float().mean().item()
    model.train()
    return 100 * right


def batches(split: Split, seed: int, epoch: int):
    """Yield (x, y, index) in an order that depends only on seed and epoch."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    for index in torch.randperm(len(split.y), generator=generator).split(BATCH_SIZE):
        yield split.x[index], split.y[index], index


def train(
    model: nn.Module,
    split: Split,
    epochs: int,
    seed: int,
    loss_of: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
    *,
    extra_parameters=(),
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> nn.Module:
    """SGD, momentum .9, cosine learning rate; methods differ only in ``loss_of(model, x, y, index)``."""
    optimizer = torch.optim.SGD([*model.parameters(), *extra_parameters], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for x, y, index in batches(split, seed, epoch):
            loss = loss_of(model, x, y, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        after_epoch(epoch)
    return model


def ce_loss(model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Plain cross-entropy."""
    return F.cross_entropy(model(x), y)


def trained_teacher(train_split: Split, epochs: int) -> nn.Module:
    """Train the teacher with cross-entropy, from a fixed seed."""
    torch.manual_seed(0)
    return train(make_teacher(), train_split, epochs, 0, ce_loss).eval()


def warm_student(train_split: Split, epochs: int, seed: int) -> nn.Module:
    """Train a student with cross-entropy: the common start of every method."""
    torch.manual_seed(seed)
    return train(make_student(), train_split, epochs, seed, ce_loss)
