"""The last feature map of models with timm's ``forward_features`` and ``forward_head``, and the head that reads it.

timm is not imported: a model only has to have the two methods.
"""

import copy
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


class Layout(NamedTuple):
    """The layout of ``forward_features``' output.

    Attributes:
        order: of its dimensions.
        prefix: number of class and register tokens, with ``"NLC"``.
        grid: (H, W) of the other tokens; None for the tokens of a square image.
    """

    order: Literal["NCHW", "NHWC", "NLC"]
    prefix: int
    grid: tuple[int, int] | None = None

    @classmethod
    def of(cls, model: nn.Module, features: Tensor, image_size: tuple[int, ...] | None = None) -> "Layout":
        """Infer the layout from a model and the output of its ``forward_features``.

        Args:
            model: with the method.
            features: the output.
            image_size: (H, W) of the images, without which tokens are taken to be those of square ones.

        Raises:
            ValueError: not a feature map of a known layout.
        """
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"expected a last feature map (N, C, H, W), (N, H, W, C) or (N, L, C), got {found}")
        if features.ndim == 3:
            prefix = getattr(model, "num_prefix_tokens", 0)
            grid = None if image_size is None else grid_of(model, image_size, features.shape[1] - prefix)
            return cls("NLC", prefix, grid)
        return cls("NHWC" if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else "NCHW", 0)

    def to_map(self, features: Tensor) -> Tensor:
        """Return a map (N, C, H, W) without class and register tokens."""
        if self.order == "NCHW":
            return features
        if self.order == "NHWC":
            return features.permute(0, 3, 1, 2)
        tokens = features[:, self.prefix :]
        size = self.grid
        if size is None or size[0] * size[1] != tokens.shape[1]:  # images of another size
            side = math.isqrt(tokens.shape[1])
            size = side, side
        if size[0] * size[1] != tokens.shape[1]:
            known = "a square image" if self.grid is None else f"a square image or a grid of {self.grid}"
            raise ValueError(f"expected the tokens of {known}, got {tokens.shape[1]} of them")
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *size)

    def from_map(self, feature_map: Tensor) -> Tensor:
        """Return the input of the model's ``forward_head`` for a map; class and register tokens are 0."""
        if self.order == "NCHW":
            return feature_map
        if self.order == "NHWC":
            return feature_map.permute(0, 2, 3, 1)
        tokens = feature_map.flatten(2).transpose(1, 2)
        return torch.cat([tokens.new_zeros(tokens.shape[0], self.prefix, tokens.shape[2]), tokens], 1)


def grid_of(model: Any, image_size: tuple[int, ...], tokens: int) -> tuple[int, int]:
    """Return (H, W) of a model's patch tokens.

    Args:
        model: with timm's ``PatchEmbed`` as ``patch_embed`` or ``stem``, without which the grid is taken to be square.
        image_size: (H, W) of the images.
        tokens: number of patch tokens.

    Raises:
        ValueError: a grid of another number of tokens.
    """
    embed: Any = getattr(model, "patch_embed", getattr(model, "stem", None))
    if hasattr(embed, "dynamic_feat_size"):
        height, width = embed.dynamic_feat_size((image_size[0], image_size[1]))
    else:
        height = width = math.isqrt(tokens)
    if height * width != tokens:
        raise ValueError(f"expected the tokens of a {height} x {width} grid, got {tokens} of them")
    return height, width


class TeacherHead(nn.Module):
    """A teacher's ``forward_head`` as a module from feature maps (N, C, H, W) to logits, without the teacher's body.

    Raises:
        ValueError: the head does not use the feature map.
    """

    def __init__(self, teacher: Any, layout: Layout, teacher_map: Tensor) -> None:
        super().__init__()
        _check_map_is_read(teacher, layout, teacher_map)
        self.layout = layout
        self.head: Any = _without_body(copy.deepcopy(teacher).eval(), layout.from_map(teacher_map))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return logits (N, C)."""
        logits: Tensor = self.head.forward_head(self.layout.from_map(feature_map))
        return logits


def _check_map_is_read(teacher: Any, layout: Layout, teacher_map: Tensor) -> None:
    """Raise ValueError if the head ignores the feature map: the student would get no gradient."""
    probe = teacher_map.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = teacher.forward_head(layout.from_map(probe))
    # not the sum of the logits, which may be constant for a symmetric head
    gradient = torch.autograd.grad(logits.square().sum(), probe, allow_unused=True)[0] if logits.requires_grad else None
    if gradient is None or not gradient.any():
        pooling = getattr(teacher, "global_pool", None)
        why = "it reads a class token" if pooling == "token" else "or its classifier is zero, as in an untrained model"
        raise ValueError(
            f"expected a teacher whose head reads the feature map, but that of {type(teacher).__name__} ignores it "
            f"(global_pool={pooling!r}, {why}): the student would get no gradient. Take a teacher with global average "
            f"pooling"
        )


def _without_body(teacher: Any, features: Tensor) -> nn.Module:
    """Drop the children and parameters that ``forward_head`` does not use."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in teacher.modules()]
    teacher.requires_grad_(True)
    with torch.enable_grad():
        logits = teacher.forward_head(features)
    for hook in hooks:
        hook.remove()
    parameters = list(teacher.parameters())
    gradients = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    used = {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    for name, child in list(teacher.named_children()):
        if not called & set(child.modules()) and not used & {id(p) for p in child.parameters()}:
            setattr(teacher, name, nn.Identity())
    for name, parameter in list(teacher.named_parameters(recurse=False)):
        if id(parameter) not in used:
            teacher.register_parameter(name, None)
    frozen: nn.Module = teacher.requires_grad_(False)
    return frozen
