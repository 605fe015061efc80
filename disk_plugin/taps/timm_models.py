"""Models that follow timm's ``forward_features`` and ``forward_head``: their last map, and the head that reads it.

Nothing of timm is imported: what counts is that a model has the two methods.
"""

import copy
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


class Layout(NamedTuple):
    """How a model's ``forward_features`` lays out its last map; ``prefix`` counts class and register tokens."""

    order: Literal["NCHW", "NHWC", "NLC"]
    prefix: int

    @classmethod
    def of(cls, model: nn.Module, features: Tensor) -> "Layout":
        """Read it off a model and what its ``forward_features`` gave.

        Raises:
            ValueError: no map of a known layout.
        """
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"expected a last feature map (N, C, H, W), (N, H, W, C) or (N, L, C), got {found}")
        if features.ndim == 3:
            return cls("NLC", getattr(model, "num_prefix_tokens", 0))
        return cls("NHWC" if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else "NCHW", 0)

    def to_map(self, features: Tensor) -> Tensor:
        """Return (N, C, H, W); tokens that stand for no position are left out."""
        if self.order == "NCHW":
            return features
        if self.order == "NHWC":
            return features.permute(0, 3, 1, 2)
        tokens = features[:, self.prefix :]
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(f"expected the tokens of a square image, got {tokens.shape[1]} of them")
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], side, side)

    def from_map(self, feature_map: Tensor) -> Tensor:
        """Return the map as the model's ``forward_head`` reads it; tokens that stand for no position are 0."""
        if self.order == "NCHW":
            return feature_map
        if self.order == "NHWC":
            return feature_map.permute(0, 2, 3, 1)
        tokens = feature_map.flatten(2).transpose(1, 2)
        return torch.cat([tokens.new_zeros(tokens.shape[0], self.prefix, tokens.shape[2]), tokens], 1)


class TeacherHead(nn.Module):
    """A teacher's ``forward_head`` as a module from a map (N, C, H, W) to logits, without the rest of the teacher.

    Raises:
        ValueError: the head does not read the map.
    """

    def __init__(self, teacher: Any, layout: Layout, teacher_map: Tensor) -> None:
        super().__init__()
        _refuse_ignored_map(teacher, layout, teacher_map)
        self.layout = layout
        self.head: Any = _without_body(copy.deepcopy(teacher).eval(), layout.from_map(teacher_map))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return logits (N, C)."""
        logits: Tensor = self.head.forward_head(self.layout.from_map(feature_map))
        return logits


def _refuse_ignored_map(teacher: Any, layout: Layout, teacher_map: Tensor) -> None:
    """A student that is trained through the head needs one that looks at the map."""
    probe = teacher_map.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = teacher.forward_head(layout.from_map(probe))
    # not the sum of the logits, which a symmetric head may make constant
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
