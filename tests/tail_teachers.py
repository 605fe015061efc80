"""Small random teachers of every family that has a tail, and ResNets of mdistiller's structure."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

CLASSES = 5
_SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 2, 4), "window_size": 2}
_VIT = {"embed_dim": 48, "depth": 3, "num_heads": 2, "patch_size": 8}
_DROP = {"drop_path_rate": 0.5}  # what evaluation mode has to turn off

# name: timm's model, its settings, the size of its images, the module that reads the tail's entry
FAMILIES = {
    "swin": ("swin_tiny_patch4_window7_224", _SWIN | _DROP, (64, 64), "layers.3"),
    "swin, shifted windows": ("swin_tiny_patch4_window7_224", _SWIN, (128, 128), "layers.3"),
    "swin, any size": ("swin_tiny_patch4_window7_224", _SWIN | {"strict_img_size": False}, (128, 192), "layers.3"),
    "swin v2": ("swinv2_tiny_window8_256", _SWIN, (64, 64), "layers.3"),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)} | _DROP, (64, 96), "stages.3"),
    "resnet": ("test_resnet", {}, (64, 96), "layer4"),
    "vit": ("vit_tiny_patch16_224", _VIT | _DROP, (32, 48), "blocks.1"),
    "vit, average": ("vit_tiny_patch16_224", _VIT | {"global_pool": "avg"}, (32, 32), "blocks.1"),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", _VIT, (32, 32), "blocks.1"),
    "beit": ("beit_base_patch16_224", _VIT, (32, 48), "blocks.1"),
    "beit, shared": (
        "beit_base_patch16_224",
        _VIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        (32, 32),
        "blocks.1",
    ),
    "eva": ("eva_large_patch14_196", _VIT, (32, 32), "blocks.1"),
    "eva 02": ("eva02_tiny_patch14_224", _VIT, (32, 48), "blocks.1"),
    "rope, mixed": ("vit_base_patch16_rope_mixed_224", _VIT, (32, 32), "blocks.1"),
    "dinov3": ("vit_base_patch16_dinov3", _VIT, (32, 48), "blocks.1"),
}
STAGES = [name for name, (*_, module) in FAMILIES.items() if not module.startswith("blocks")]
ISOTROPIC = [name for name in FAMILIES if name not in STAGES]


def timm_teacher(name, **settings):
    """Return the teacher of a family, in evaluation mode and with weights that are not those of its initialisation."""
    timm = pytest.importorskip("timm")
    model, given, size, _ = FAMILIES[name]
    sized = {} if name in ("convnext", "resnet") else {"img_size": size}
    teacher = timm.create_model(model, num_classes=CLASSES, **given, **sized, **settings)
    with torch.no_grad():
        for parameter in teacher.parameters():  # position biases and layer scales begin at 0
            parameter.add_(0.1 * torch.randn_like(parameter))
        for norm in teacher.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.uniform_(-0.2, 0.2)
                norm.running_var.uniform_(0.5, 1.5)
    return teacher.eval()


def images(name, count=2):
    return torch.randn(count, 3, *FAMILIES[name][2])


class Block(nn.Module):
    """A residual block; ``preact``: activated before, not after; ``last``: also returns its sum before activation."""

    def __init__(self, width_in, width, stride, *, preact, last):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
        self.preact, self.last = preact, last

    def forward(self, x):
        x = F.relu(x) if self.preact else x
        y = self.norm(self.conv(x)) + self.skip(x)
        if self.preact:
            return y
        return (F.relu(y), y) if self.last else F.relu(y)


class MDistillerResNet(nn.Module):
    """The structure of mdistiller's ResNets: of CIFAR with three stages, or with ``preact`` of ImageNet with four."""

    def __init__(self, widths=(8, 16, 24), *, preact=False, depth=2):
        super().__init__()
        self.conv1, self.stages_count, self.preact = nn.Conv2d(3, 8, 3, padding=1), len(widths), preact
        before = 8
        for stage, width in enumerate(widths, 1):
            blocks = [Block(before, width, 1 if stage == 1 else 2, preact=preact, last=depth == 1)]
            blocks += [Block(width, width, 1, preact=preact, last=each == depth - 1) for each in range(1, depth)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            before = width
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(before, CLASSES)

    def forward(self, x):
        x, feats = F.relu(self.conv1(x)), []
        for stage in range(1, self.stages_count + 1):
            x = getattr(self, f"layer{stage}")(x)
            x = x[0] if isinstance(x, tuple) else x
            feats.append(F.relu(x) if self.preact else x)
        pooled = self.avgpool(feats[-1]).flatten(1)
        return self.fc(pooled), {"feats": feats, "pooled_feat": pooled}
