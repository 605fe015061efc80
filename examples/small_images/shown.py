"""Views transformed for a condition: smaller images, superclasses, a corrected teacher."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from . import data
from .views import Views, kept

# CIFAR-100's superclasses; classes are numbered in alphabetical order
SUPERCLASSES = """
beaver dolphin otter seal whale | aquarium_fish flatfish ray shark trout | orchid poppy rose sunflower tulip
| bottle bowl can cup plate | apple mushroom orange pear sweet_pepper | clock keyboard lamp telephone television
| bed chair couch table wardrobe | bee beetle butterfly caterpillar cockroach | bear leopard lion tiger wolf
| bridge castle house road skyscraper | cloud forest mountain plain sea | camel cattle chimpanzee elephant kangaroo
| fox porcupine possum raccoon skunk | crab lobster snail spider worm | baby boy girl man woman
| crocodile dinosaur lizard snake turtle | hamster mouse rabbit shrew squirrel
| maple_tree oak_tree palm_tree pine_tree willow_tree | bicycle bus motorcycle pickup_truck train
| lawn_mower rocket streetcar tank tractor
"""


def superclass_of() -> Tensor:
    """Return the superclass of each class, (100,)."""
    groups = [group.split() for group in SUPERCLASSES.split("|")]
    names = sorted(name for group in groups for name in group)
    return torch.tensor([next(i for i, group in enumerate(groups) if name in group) for name in names])


class Shown:
    """Wrap :class:`Views`; a run takes either.

    Args:
        views: of the full-size images.
        pixels: side of the students' images, by average pooling; the teacher gets them at full size.
        superclasses: 20 classes instead of 100. The teacher's probability of one is the sum over its classes.
        corrected: where the teacher is wrong, swap the logits of its prediction and of the label.
        folder: stores the smaller images of each view, or None.
    """

    def __init__(
        self,
        views: Views,
        *,
        pixels: int = 32,
        superclasses: bool = False,
        corrected: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.views, self.pixels, self.corrected, self.folder = views, pixels, corrected, folder
        self.count, self.teacher = views.count, views.teacher
        self.superclass = superclass_of() if superclasses else None
        self.train = self.split(views.train)
        self.content = f"{views.content}, pixels {pixels}, superclasses {superclasses}, corrected {corrected}"

    def split(self, split: data.Split) -> data.Split:
        """Return another split with the students' images and classes."""
        labels = split.labels if self.superclass is None else self.superclass.to(split.labels.device)[split.labels]
        return data.Split(pooled(split.images, self.pixels), labels)

    def __call__(self, seed: int, epoch: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the images of an epoch and the teacher's (logits, features) on them."""
        number = self.views.number(seed, epoch)
        images = kept(
            self.folder / f"view-{number:03d}.pt" if self.folder else None,
            lambda: pooled(data.augmented(self.views.train.images, number), self.pixels),
        )
        if not self.teacher:
            return images, None
        outputs = self.views.kept_outputs(number)
        if outputs is None:
            outputs = self.views.outputs(data.augmented(self.views.train.images, number), number)
        return images, (self.logits(outputs[0], self.views.train.labels), outputs[1])

    def logits(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Return the teacher's logits over the students' classes; ``labels`` of the 100 classes, on training images."""
        if self.corrected and labels is not None:
            logits = put_right(logits, labels)
        if self.superclass is None:
            return logits
        members = self.superclass.argsort(stable=True).view(20, 5)
        return logits.float()[:, members.to(logits.device)].logsumexp(2).to(logits.dtype)


def pooled(images: Tensor, pixels: int) -> Tensor:
    """Average-pool uint8 images to a side of ``pixels``."""
    factor = images.shape[-1] // pixels
    if factor == 1:
        return images
    return torch.cat([F.avg_pool2d(part.float(), factor).round().to(torch.uint8) for part in images.split(5000)])


def put_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Swap the label's logit with the largest."""
    rows, chosen = torch.arange(len(labels), device=logits.device), logits.argmax(1)
    out = logits.clone()
    out[rows, chosen], out[rows, labels] = logits[rows, labels], logits[rows, chosen]
    return out
