"""The networks of the examples by name: the ResNet10 family, several copies of which run as one, and a Swin teacher."""

from torch import nn

from .resnet import SHAPES, ResNet

SWIN = "swin"
TEACHERS = sorted({*SHAPES, SWIN})


def network(name: str, num_classes: int = 100, copies: int = 1, features: int | None = None) -> nn.Module:
    """Build a network; ``copies`` and ``features`` are ResNet's."""
    if name != SWIN:
        return ResNet(name, num_classes, copies, features)
    from .swin import Swin  # timm is needed for it alone

    return Swin(num_classes)


def width_of(name: str) -> int:
    """Return the number of features that the last layer reads."""
    if name != SWIN:
        return SHAPES[name][0][-1]
    from .swin import WIDTH

    return WIDTH
