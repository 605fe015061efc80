"""CIFAR-100 for a student of a few units: principal components of small images, a convolutional teacher's outputs."""

from pathlib import Path

import torch
from small_images import data
from small_images.resnet import ResNet, parted
from small_images.views import outputs_of
from torch import Tensor

COMPONENTS, SAMPLED = 128, 20_000


def write(cifar: Path, teacher: Path, folder: Path) -> None:
    """Write ``pixels.pt``: inputs of unit variance and labels of three splits, the teacher's outputs on the first.

    The validation split is the part that the teacher was not trained on (``data.search_split``).

    Raises:
        FileNotFoundError: no such data or checkpoint.
    """
    path = folder / "pixels.pt"
    if path.exists():
        return
    if not teacher.exists():
        raise FileNotFoundError(f"expected the checkpoint of a ResNet10-l in {teacher}, got none")
    train, test = data.load(cifar)
    own, held_out = data.search_split(len(train.labels))
    model = ResNet("resnet10-l").to(memory_format=torch.channels_last).eval()
    model.load_state_dict(parted(torch.load(teacher, weights_only=True)["model"], 1)[0])
    splits = {"train": train.part(own), "validation": train.part(held_out), "test": test}
    x = _pooled(splits["train"].images)
    mean = x.mean(0)
    directions = torch.linalg.svd(x[:SAMPLED] - mean, full_matrices=False).Vh[:COMPONENTS].T
    scale = ((x - mean) @ directions).std(0)
    logits, features = outputs_of(model, splits["train"].images)
    on_test, _ = outputs_of(model, test.images)
    kept = {
        "teacher_logits": logits,
        "teacher_features": features,
        "teacher_test": 100 * (on_test.argmax(1) == test.labels).float().mean().item(),
        **{name: ((_pooled(split.images) - mean) @ directions / scale, split.labels) for name, split in splits.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(kept, path)


def _pooled(images: Tensor) -> Tensor:
    """uint8 (N, 3, 32, 32) -> (N, 768), means of 2 x 2 pixels in [0, 1]."""
    return torch.nn.functional.avg_pool2d(images.float() / 255, 2).flatten(1)
