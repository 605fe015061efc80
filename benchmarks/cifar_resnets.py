"""The residual networks for 32x32 images that the benchmarks train, by their names in papers."""

from torch import Tensor, nn
from torch.nn.functional import relu

# name -> width of the stem, widths of the stages, blocks in each
SHAPES = {
    "resnet32x4": (32, (64, 128, 256), 5),
    "resnet8x4": (32, (64, 128, 256), 1),
    "resnet10-l": (32, (32, 64, 128, 256), 1),
    "resnet10-xxs": (8, (8, 8, 16, 16), 1),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """3x3 stem, stages of which each but the first halves the image, average pooling, a linear layer.

    Args:
        name: a key of ``SHAPES``.
        num_classes: C.

    Shape:
        images (N, 3, H, W); returns logits (N, C).
    """

    def __init__(self, name: str, num_classes: int = 100) -> None:
        super().__init__()
        width, stages, count = SHAPES[name]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential()
        for stage, outputs in enumerate(stages):
            for block in range(count):
                self.blocks.append(BasicBlock(width, outputs, 2 if stage and not block else 1))
                width = outputs
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.classifier(self.blocks(relu(self.bn1(self.conv1(images)))).mean((2, 3)))
