"""Augmented views and the teacher's outputs on them, made on the device and kept there."""

import copy

import torch
from small_images import data
from small_images.resnet import ResNet
from small_images.views import Views, outputs_of
from torch import Tensor

_SAME_POLICY = 250  # images that share one draw of AutoAugment: a group is a few small kernels


class DeviceViews(Views):
    """``Views`` that stay in the device's memory: 3.8 kB per image and view with a teacher of 256 features.

    Args:
        train: the training split, on the device.
        count: number of distinct views.
        teacher: the network whose outputs are wanted; may be set later.
    """

    def __init__(self, train: data.Split, count: int, teacher: ResNet | None = None) -> None:
        super().__init__(train, count, teacher, None)
        self._images: dict[int, Tensor] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, seed: int, epoch: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the images of an epoch and the teacher's (logits, features) on them."""
        number = (7 * seed + epoch) % self.count
        if number not in self._images:
            self._images[number] = data.augmented(self.train.images, number, _SAME_POLICY)
        images = self._images[number]
        if self.teacher is None:
            return images, None
        if number not in self._seen:
            self._seen[number] = outputs_of(self.teacher, images)
        return images, self._seen[number]

    def untaught(self) -> "DeviceViews":
        """Return the same views, their memory shared, without a teacher."""
        views = copy.copy(self)
        views.teacher = None
        return views


def fitting(wanted: int, images: Tensor, device: str) -> int:
    """Return how many views a third of the free memory holds, at least 1 and at most ``wanted``."""
    if device == "cpu":
        return wanted
    free, _ = torch.cuda.mem_get_info()
    size = images.numel() + len(images) * 2 * (100 + 256)
    return max(1, min(wanted, free // 3 // size))
