"""Augmented views of the training images, the teacher's outputs on them, and the students' batches."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import data
from .method import Batch
from .resnet import ResNet, State


class Views:
    """Augmented views of the training images, with the teacher's outputs on them, computed lazily.

    Args:
        train: the whole training split; runs select samples of it by position.
        count: number of distinct views; epoch e of seed s uses view (7 s + e) mod count.
        teacher: the network to compute outputs of, or None.
        folder: stores the teacher's outputs in half precision (712 bytes per image and view at 256 features), or None.
        maps: whether the teacher's last map is among them (2 kB more at 2 x 2).
    """

    def __init__(
        self, train: data.Split, count: int, teacher: nn.Module | None, folder: Path | None, maps: bool = False
    ) -> None:
        self.train, self.count, self.teacher, self.folder, self.maps = train, count, teacher, folder, maps
        self.content = digest({"images": train.images, "labels": train.labels})

    def __call__(self, seed: int, epoch: int) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return the images of an epoch and the teacher's (logits, features) or (logits, features, map) on them."""
        number = self.number(seed, epoch)
        images = data.augmented(self.train.images, number)
        return images, self.outputs(images, number) if self.teacher else None

    def number(self, seed: int, epoch: int) -> int:
        """Return the view of an epoch."""
        return (7 * seed + epoch) % self.count

    def outputs(self, images: Tensor, number: int) -> tuple[Tensor, ...]:
        """Return the teacher's outputs on the images of a view, and store them."""
        return kept(self._path(number), lambda: outputs_of(self.teacher, images, maps=self.maps))

    def kept_outputs(self, number: int) -> tuple[Tensor, ...] | None:
        """Return a view's stored outputs, or None."""
        path = self._path(number)
        return tuple(torch.load(path, weights_only=True)) if path and path.exists() else None

    def _path(self, number: int) -> Path | None:
        return self.folder / f"view-{number:03d}.pt" if self.folder else None


def kept(path: Path | None, compute: Callable[[], Any]) -> Any:
    """Return the content of a file, computed and written on the first call."""
    if path and path.exists():
        return torch.load(path, weights_only=True)
    content = compute()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(content, path)
    return content


def save(state: Any, path: Path) -> None:
    """Write a file atomically."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(state, partial)
    partial.replace(path)


def digest(state: State) -> str:
    """Return a short fingerprint of weights or data."""
    content = hashlib.sha256()
    for value in state.values():
        content.update(value.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:12]


def precision(device: str):
    """bfloat16 for the networks; the losses compute in float32."""
    return torch.autocast(device, torch.bfloat16)


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor, batch_size: int = 500, maps: bool = False) -> tuple[Tensor, ...]:
    """Return logits (N, C) and pooled features (N, D), with ``maps`` also the last map, in half precision."""
    model.eval()
    parts = []
    with precision(images.device.type):
        for part in images.split(batch_size):
            logits, features, *shown = model.outputs(normalized(part), maps)
            parts.append([each.half() for each in (logits, features, *shown[-1:])])
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def normalized(images: Tensor) -> Tensor:
    """Return the network's input, in the fastest memory format for convolutions."""
    return data.normalized(images).contiguous(memory_format=torch.channels_last)


def accuracies(model: nn.Module, split: data.Split, copies: int) -> list[float]:
    """Return each copy's accuracy on the split, percent."""
    logits = outputs_of(model, split.images)[0]
    right = logits.unflatten(1, (copies, -1)).argmax(2) == split.labels.unsqueeze(1)
    return (100 * right.float().mean(0)).tolist()


def error(student: str, start: State, images: data.Split) -> float:
    """Return the error of a warm start, in [0, 1]: the paper's budget; not on test images."""
    model = ResNet(student).to(images.images.device)
    model.load_state_dict(start)
    return 1 - accuracies(model, images, 1)[0] / 100


def batches(views: Views, index: Tensor, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    """Yield an epoch's batches, in an order that depends only on seed and epoch."""
    images, outputs = views(seed, epoch)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = index[torch.randperm(len(index), generator=generator)].to(images.device)
    empty = images.new_empty((len(images), 0), dtype=torch.half)
    logits, features, *maps = outputs or (empty, empty)
    for part in order.split(batch_size):
        labels = views.train.labels[part]
        shown = (each[part].float() for each in maps)
        yield Batch(normalized(images[part]), labels, logits[part].float(), features[part].float(), part, *shown)
