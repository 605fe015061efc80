"""An epoch of DiSK from a teacher cache against cross-entropy alone and against online KD, ResNet10-l -> ResNet10-xxs.

2,000 random 32x32 images, stored as bytes and opened as PIL images like CIFAR's, with random crop and flip, loaded in
the training process. An epoch is all of that, the student's training and, for online KD, the teacher's forward.
``SeededViews`` makes the augmentation repeatable, which takes time: ratios about the cache have it on both sides, and
it is measured separately against the plain dataset.

Usage: python benchmarks/cached.py [--pairs N] [--samples N] [--batch-size N] [--out DIR] [--dry-run]
"""

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cifar_resnets import CifarResNet
from distillation import kd_loss
from pairs import compare, keep, results, row, table
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.cache import SeededViews, TeacherCache

VIEWS = 2
CE, KD, DISK = "CE, SeededViews", "online KD, SeededViews", "DiSK from cache, SeededViews"
PLAIN_CE, PLAIN_KD = "CE, plain data set", "online KD, plain data set"
# (ours, theirs) -> bar
COMPARED = {(DISK, CE): 1.10, (DISK, KD): 0.6, (CE, PLAIN_CE): None, (DISK, PLAIN_CE): None, (DISK, PLAIN_KD): None}


class Images(Dataset[tuple[Tensor, int]]):
    """Random images, stored and opened like torchvision's CIFAR-100."""

    def __init__(self, samples: int) -> None:
        self.data = torch.randint(256, (samples, 32, 32, 3), dtype=torch.uint8).numpy()
        self.targets = torch.randint(100, (samples,)).tolist()
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize((0.5,) * 3, (0.25,) * 3)])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def epochs(
    student: nn.Module, dataset: Dataset[Any], batch_size: int, loss: Callable[..., Tensor]
) -> Callable[[], None]:
    """Return a function that trains a copy of the student, and the loss's own parameters, for an epoch.

    ``loss`` takes the student and the entries of the dataset's items.
    """
    student = copy.deepcopy(student)
    learned = [*student.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    optimizer = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader, number = DataLoader(dataset, batch_size, shuffle=True), itertools.count()

    def epoch() -> None:
        if isinstance(dataset, SeededViews):
            dataset.set_epoch(next(number))
        for batch in loader:
            optimizer.zero_grad()
            loss(student, *batch).backward()
            optimizer.step()

    return epoch


def ce(student: nn.Module, image: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    """Cross-entropy alone."""
    return cross_entropy(student(image), target)


class OnlineKD:
    """Distillation with an online teacher."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher.eval()

    def __call__(self, student: nn.Module, image: Tensor, target: Tensor, *_: Tensor) -> Tensor:
        """Run the teacher and evaluate the loss."""
        with torch.no_grad():
            teacher_logits = self.teacher(image)
        return kd_loss(student(image), teacher_logits, target)


class CachedDiSK(nn.Module):
    """DiSK with cached teacher outputs."""

    def __init__(self, cache: TeacherCache) -> None:
        super().__init__()
        self.cache, self.disk = cache, DiSKLoss(GuideHead(cache.num_classes, cache.feature_dim))

    def forward(self, student: nn.Module, image: Tensor, target: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Read the cache and evaluate the loss."""
        teacher_logits, teacher_features = self.cache(index, view)
        return self.disk(student(image), teacher_logits, target, teacher_features)


def measured(images: Images, batch_size: int, pairs: int, folder: str) -> list[dict[str, Any]]:
    """Write the cache, then compare epochs of students with the same initial weights."""
    views = SeededViews(images, VIEWS)
    teacher, student = CifarResNet("resnet10-l"), CifarResNet("resnet10-xxs")
    kd, disk = OnlineKD(teacher), CachedDiSK(TeacherCache.write(folder, teacher, views, progress=False))
    kinds = {CE: (views, ce), KD: (views, kd), DISK: (views, disk), PLAIN_CE: (images, ce), PLAIN_KD: (images, kd)}
    steps = {name: epochs(student, dataset, batch_size, loss) for name, (dataset, loss) in kinds.items()}
    return [
        row(f"{ours} / {theirs}", compare(steps[ours], steps[theirs], pairs=pairs, warmup=1), bar)
        for (ours, theirs), bar in COMPARED.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--out", type=Path, help="folder for cached.json")
    parser.add_argument("--dry-run", action="store_true", help="40 samples, six pairs")
    args = parser.parse_args()
    samples, batch_size, pairs = (40, 20, 6) if args.dry_run else (args.samples, args.batch_size, args.pairs)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Images(samples), batch_size, pairs, folder)
    found = results(rows, f"An epoch of {samples} images, batch {batch_size}, ResNet10-l -> ResNet10-xxs")
    print(table(found))
    keep(found, args.out, "cached")


if __name__ == "__main__":
    main()
