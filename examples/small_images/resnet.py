"""The ResNet10 family of Kag et al. (ICLR 2023), appendix A.4, several copies of which can run as one network.

``copies`` networks share every kernel call through grouped convolutions, which on a CPU is about twice as fast as
running them sequentially, for networks this small. Each parameter of the joint network is the concatenation of the
copies' along dimension 0: :func:`joined` and :func:`parted` convert between the two, and elementwise optimizers such as
SGD treat the copies as if trained separately.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# name -> (filters of the four stages, blocks of the four stages)
SHAPES = {
    "resnet10-xxs": ((8, 8, 16, 16), (1, 1, 1, 1)),
    "resnet10-xs": ((8, 16, 16, 32), (1, 1, 1, 1)),
    "resnet10-s": ((8, 16, 32, 64), (1, 1, 1, 1)),
    "resnet10-m": ((16, 32, 64, 128), (1, 1, 1, 1)),
    "resnet10-l": ((32, 64, 128, 256), (1, 1, 1, 1)),
    "resnet10": ((64, 128, 256, 512), (1, 1, 1, 1)),
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": ((64, 128, 256, 512), (3, 4, 6, 3)),
}

State = dict[str, Tensor]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, copies: int) -> None:
        super().__init__()
        groups = {"groups": copies, "bias": False}
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, **groups)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, **groups)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, **groups), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class JoinedLinear(nn.Module):
    """``copies`` linear layers, each on its own features: (N, copies * F) -> (N, copies * C)."""

    def __init__(self, features: int, classes: int, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.weight = nn.Parameter(torch.empty(copies * classes, features))
        self.bias = nn.Parameter(torch.empty(copies * classes))

    def forward(self, x: Tensor) -> Tensor:
        """Apply each copy's layer to its features."""
        features, weight = x.unflatten(1, (self.copies, -1)), self.weight.unflatten(0, (self.copies, -1))
        return torch.einsum("nmf,mcf->nmc", features, weight).flatten(1) + self.bias


class ResNet(nn.Module):
    """A member of the family for 32x32 images: 3x3 stem without pooling, four stages, average pooling, a linear layer.

    Args:
        name: a key of ``SHAPES``.
        num_classes: C.
        copies: M networks in one; for M > 1 load the weights, see :func:`joined`.
        features: width of a linear layer before the last, which bounds the rank of the logits; None for no such layer.

    Shape:
        images (N, 3, H, W), the same for every copy; returns logits (N, M * C).
    """

    def __init__(self, name: str, num_classes: int = 100, copies: int = 1, features: int | None = None) -> None:
        super().__init__()
        if name not in SHAPES:
            raise ValueError(f"name must be one of {sorted(SHAPES)}, got {name!r}")
        widths, blocks = SHAPES[name]
        width = copies * widths[0]
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)  # not grouped: the copies share the image
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        for stage, (filters, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage and not block else 1
                stages.append(BasicBlock(width, copies * filters, stride, copies))
                width = copies * filters
        self.blocks = nn.Sequential(*stages)
        self.map_blocks = (len(stages) - blocks[-1] - 1, len(stages) - 1)  # whose outputs are shown as maps
        readout = [widths[-1], num_classes] if features is None else [widths[-1], features, num_classes]
        layers = [nn.Linear(*each) if copies == 1 else JoinedLinear(*each, copies) for each in pairwise(readout)]
        self.bottleneck = nn.Sequential(*layers[:-1])
        self.classifier = layers[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of all copies."""
        return self.outputs(images)[0]

    def outputs(self, images: Tensor, maps: bool = False) -> tuple[Tensor, ...]:
        """Return the logits of all copies, and what their last layers read, (N, M * D).

        With ``maps`` also the map before the last stage and the last map, (N, M * D, H, W).
        """
        out = F.relu(self.bn1(self.conv1(images)))
        seen = []
        for block in self.blocks:
            out = block(out)
            seen.append(out)
        features = self.bottleneck(out.mean((2, 3)))
        shown = (self.classifier(features), features)
        return (*shown, *(seen[number] for number in self.map_blocks)) if maps else shown

    def head(self, copy: int, copies: int) -> nn.Module | partial:
        """Return the last layer of one copy, from its features (N, D) to its logits."""
        if copies == 1:
            return self.classifier
        rows = slice(copy * len(self.classifier.bias) // copies, (copy + 1) * len(self.classifier.bias) // copies)
        return partial(F.linear, weight=self.classifier.weight[rows], bias=self.classifier.bias[rows])


def joined(states: list[State]) -> State:
    """Return the state of the joint network whose copies have these states."""
    return {
        key: torch.cat([state[key] for state in states]) if value.ndim else value for key, value in states[0].items()
    }


def parted(state: State, copies: int) -> list[State]:
    """Return the states of the copies of a joint network."""
    chunks = {key: value.chunk(copies) if value.ndim else [value] * copies for key, value in state.items()}
    return [{key: chunk[copy].clone() for key, chunk in chunks.items()} for copy in range(copies)]
