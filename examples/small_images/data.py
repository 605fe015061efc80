"""CIFAR-100 as tensors, its split for the search, and augmented views that are functions of their number."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.datasets import CIFAR100
from torchvision.transforms import AutoAugmentPolicy, v2

MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)  # of the training images
HELD_OUT = 5000
_PART_SEED = 123_456_789  # not a seed of any epoch's order
_FLIP_SEED = 987_654_321  # not a seed of any epoch's order: the flipped samples would come first in it
_SAME_POLICY = 10  # images that share one draw of AutoAugment
_PADDING, _HOLE = 4, 16  # RandomCrop's padding and Cutout's square, pixels


class Split(NamedTuple):
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def part(self, index: Tensor) -> "Split":
        """Return the samples at ``index``."""
        return Split(self.images[index], self.labels[index])


def load(path: Path) -> tuple[Split, Split]:
    """Read training and test split from an ``.npz`` (train_x, train_y, test_x, test_y) or torchvision's folder.

    Raises:
        FileNotFoundError: neither is at ``path``.
    """
    if path.suffix == ".npz" and path.is_file():
        with np.load(path) as file:
            return _split(file["train_x"], file["train_y"]), _split(file["test_x"], file["test_y"])
    if not (path / "cifar-100-python").is_dir():
        raise FileNotFoundError(f"data must be a cifar100.npz or a folder that holds cifar-100-python/, got {path}")
    train, test = (_Files(path, train=train) for train in (True, False))
    return _split(train.data, train.targets), _split(test.data, test.targets)


class _Files(CIFAR100):
    """torchvision's reader without the checksum: repacked copies of the dataset hold the same images."""

    def _check_integrity(self) -> bool:
        return True

    def _load_meta(self) -> None:
        pass


def _split(images, labels) -> Split:
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(np.array(labels)).long())


def synthetic(samples: int = 1200) -> tuple[Split, Split]:
    """Return random images in 100 classes that differ in their mean colour, for ``--dry-run``."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 100
    colours = torch.randint(60, 196, (100, 3, 1, 1), generator=generator)
    noise = torch.randint(-60, 60, (samples, 3, 32, 32), generator=generator)
    whole = Split((colours[labels] + noise).to(torch.uint8), labels)
    return whole.part(torch.arange(samples * 5 // 6)), whole.part(torch.arange(samples * 5 // 6, samples))


def search_split(size: int, held_out: int = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Return the positions of the training split that the search trains on, and those it validates on."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order[held_out:].sort().values, order[:held_out].sort().values


def part_of(index: Tensor, count: int) -> Tensor:
    """Return the positions of a random part, deterministic; longer parts contain shorter ones."""
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(_PART_SEED))[:count]]


def flip(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return labels with a share flipped to another class, and the mask of flipped ones."""
    generator = torch.Generator().manual_seed(_FLIP_SEED)
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]] = True
    other = (labels + torch.randint(1, 100, labels.shape, generator=generator)) % 100
    return torch.where(flipped, other, labels), flipped


def normalized(images: Tensor) -> Tensor:
    """uint8 -> float32 with mean 0 and standard deviation 1 per channel."""
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augmented(images: Tensor, view: int, same_policy: int = _SAME_POLICY) -> Tensor:
    """Return one augmented copy of every image: RandomCrop, flip, AutoAugment, Cutout (appendix A.3), seeded by view.

    Crop, flip and hole are drawn per image. AutoAugment is torchvision's, applied to random groups of ``same_policy``
    images: each image's policy has the right distribution, but is shared within its group.
    """
    generator = torch.Generator().manual_seed(view)
    order = torch.randperm(len(images), generator=generator)
    out = _cropped_and_flipped(images[order], generator)
    policy = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(view)
        out = torch.cat([policy(group) for group in out.split(same_policy)])
    return _with_holes(out, generator)[order.argsort()]


def _cropped_and_flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    size, count = images.shape[-1], len(images)
    padded = F.pad(images, [_PADDING] * 4)
    top, left = torch.randint(2 * _PADDING + 1, (2, count, 1), generator=generator)
    along = torch.arange(size)
    rows, columns = top + along, left + along
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    where = torch.arange(count).view(-1, 1, 1, 1), torch.arange(3).view(1, -1, 1, 1)
    where = *where, rows.view(count, 1, size, 1), columns.view(count, 1, 1, size)
    return padded[tuple(part.to(images.device) for part in where)]


def _with_holes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cutout: a square around a random pixel becomes the mean colour, which is 0 once normalised."""
    size, count = images.shape[-1], len(images)
    row, column = torch.randint(size, (2, count, 1), generator=generator)
    along = torch.arange(size)
    inside = [((along - centre) < _HOLE // 2) & ((along - centre) >= -_HOLE // 2) for centre in (row, column)]
    hole = (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1).to(images.device)
    colour = torch.tensor([round(255 * mean) for mean in MEAN], dtype=torch.uint8, device=images.device)
    return torch.where(hole, colour.view(3, 1, 1), images)
