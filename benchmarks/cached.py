"""An epoch of DiSK from a teacher cache against cross-entropy alone and against online KD, ResNet10-l -> ResNet10-xxs.

2,000 random 32x32 images, stored as bytes and opened as PIL images like CIFAR's, with random crop and flip, loaded in
the training process. An epoch is all of that, the student's training and, for online KD, the teacher's forward.
``SeededViews`` makes the augmentation repeatable, which costs time of its own: it is under both sides where ratios are
about the cache, and measured apart against the plain data set.

Usage: python benchmarks/cached.py [--pairs N] [--samples N] [--batch-size N] [--out DIR] [--dry-run]
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cifar_resnets import CifarResNet
from distillation import kd_loss
from pairs import compare, keep, results, row, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.cache import SeededViews, TeacherCache

VIEWS = 2
CE, KD, DISK = "CE, SeededViews", "online KD, SeededViews", "DiSK from cache, SeededViews"
PLAIN_CE, PLAIN_KD = "CE, plain data set", "online KD, plain data set"
PAIRS = {(DISK, CE): 1.10, (DISK, KD): 0.6, (CE, PLAIN_CE): None, (DISK, PLAIN_CE): None, (DISK, PLAIN_KD): None}


class Images(Dataset[tuple[Tensor, int]]):
    """Random images as torchvision's CIFAR-100 gives them."""

    def __init__(self, samples: int) -> None:
        self.data = torch.randint(256, (samples, 3, 32, 32), dtype=torch.uint8)
        self.targets = torch.randint(100, (samples,)).tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.data[index])), self.targets[index]


class Epochs:
    """Epochs of training of one student; ``loss`` takes what the loader gives: image, target, index and view."""

    def __init__(
        self,
        student: nn.Module,
        dataset: Dataset[Any],
        batch_size: int,
        loss: Callable[..., Tensor],
        others: Iterator[nn.Parameter] = iter(()),
    ) -> None:
        ...
