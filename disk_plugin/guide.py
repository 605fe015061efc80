"""The guide network: teacher outputs in, one logit per sample out."""

import inspect
import math
from typing import Literal

import torch
from torch import Tensor, nn

from . import _checks

# Logits are clamped to at most this far below the row's largest: at a temperature of 4 a probability ratio of 4e-6.
# Masked classes (-1e4, or the smallest float) would otherwise dominate the input.
_SPAN, _LARGEST = 50.0, 1e4


class GuideHead(nn.Module):
    """Guide g(x) of Kag et al. (ICLR 2023), appendix A.4: an MLP on the teacher's logits and pooled features.

    Linear, norm and ReLU twice (64 and 128 wide), then Linear to one value, returned before its sigmoid. The paper's
    norm is BatchNorm. The default here is LayerNorm, which accepts a batch of one sample, behaves the same in training
    and evaluation, and needs no synchronization between replicas. Inputs are cast to the parameters' dtype. Logits are
    clamped to at most 50 below the row's largest, as masked classes would dominate the input.

    Args:
        num_classes: C, >= 2.
        feature_dim: D, width of the teacher's features; 0 for a guide on logits only.
        use_logits: whether the teacher's logits are an input; False needs ``feature_dim`` > 0.
        hidden_dims: widths of the hidden layers.
        norm: ``"layer"``, or ``"batch"`` as in the paper, whose statistics include ignored targets, as zeros.
        initial: approximate initial g in (0, 1), set by the last bias; None for torch's initialization, near .5. In a
            loss that holds the discount, the default, that sets the level of g instead.

    Shape:
        teacher_logits (N, C) or (N, C, d1, ...); teacher_features (N, D), shared by all pixels of a sample, or
        (N, D, d1, ...); returns guide logits (N,) or (N, d1, ...).

    Raises:
        ValueError: ``num_classes`` < 2, ``feature_dim`` < 0, an unknown norm, ``initial`` outside (0, 1), neither
            logits nor features as input, an empty ``hidden_dims``; in ``forward`` inputs of another width or shape.
        TypeError: values or inputs of another type.

    Examples:
        >>> import torch
        >>> guide = GuideHead(num_classes=100, feature_dim=256)
        >>> guide(torch.randn(8, 100), torch.randn(8, 256)).shape
        torch.Size([8])
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int = 0,
        *,
        use_logits: bool = True,
        hidden_dims: tuple[int, ...] = (64, 128),
        norm: Literal["layer", "batch"] = "layer",
        initial: float | None = None,
    ) -> None:
        super().__init__()
        _checks.integer("num_classes", num_classes, at_least=2)
        _checks.integer("feature_dim", feature_dim, at_least=0)
        _checks.choice("norm", norm, ("layer", "batch"))
        if not isinstance(use_logits, bool):
            raise TypeError(f"use_logits must be a bool, got {type(use_logits).__name__} {use_logits!r}")
        if not use_logits and feature_dim == 0:
            raise ValueError("use_logits=False needs feature_dim > 0, got feature_dim=0: the guide would read nothing")
        if not isinstance(hidden_dims, tuple | list):
            raise TypeError(f"hidden_dims must be a tuple of ints, got {type(hidden_dims).__name__} {hidden_dims!r}")
        if not hidden_dims:
            raise ValueError("hidden_dims must name at least one layer, got ()")
        for width in hidden_dims:
            _checks.integer("hidden_dims", width, at_least=1)
        if initial is not None:
            _checks.number("initial", initial, above=0)
            if initial >= 1:
                raise ValueError(f"initial must be < 1, got {initial}")
        self.num_classes, self.feature_dim, self.use_logits = num_classes, feature_dim, use_logits
        width = feature_dim + (num_classes if use_logits else 0)
        layers: list[nn.Module] = []
        for hidden in hidden_dims:
            layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden) if norm == "layer" else nn.BatchNorm1d(hidden)]
            layers += [nn.ReLU()]
            width = hidden
        last = nn.Linear(width, 1)
        if initial is not None:
            nn.init.constant_(last.bias, math.log(initial / (1 - initial)))
        self.mlp = nn.Sequential(*layers, last)

    def forward(self, teacher_logits: Tensor, teacher_features: Tensor | None = None) -> Tensor:
        """Return the guide before its sigmoid, (N,) or (N, d1, ...)."""
        self._check(teacher_logits, teacher_features)
        positions = teacher_logits.shape[2:]
        dtype = next(layer.weight.dtype for layer in self.mlp if isinstance(layer, nn.Linear))
        inputs = [_bounded(teacher_logits.to(dtype))] if self.use_logits else []
        if teacher_features is not None:
            trailing = [1] * (teacher_logits.ndim - teacher_features.ndim)
            inputs += [teacher_features.reshape(*teacher_features.shape, *trailing).expand(-1, -1, *positions)]
        joined = torch.cat([value.to(dtype) for value in inputs], 1).movedim(1, -1)  # (N, d1, ..., width)
        logits: Tensor = self.mlp(joined.flatten(0, -2))
        return logits.reshape(joined.shape[:-1])

    def _check(self, teacher_logits: Tensor, teacher_features: Tensor | None) -> None:
        _checks.tensor("teacher_logits", teacher_logits)
        shape = tuple(teacher_logits.shape)
        if len(shape) < 2 or shape[1] != self.num_classes:
            raise ValueError(
                f"teacher_logits must have shape (N, {self.num_classes}, ...), got {shape}: the guide was "
                f"built with num_classes={self.num_classes}"
            )
        if teacher_features is None:
            if self.feature_dim:
                raise ValueError(f"the guide was built with feature_dim={self.feature_dim}, got no teacher_features")
            return
        _checks.tensor("teacher_features", teacher_features)
        if not self.feature_dim:
            raise ValueError(
                f"the guide was built without features (feature_dim=0), got teacher_features of shape "
                f"{tuple(teacher_features.shape)}"
            )
        pooled, dense = (shape[0], self.feature_dim), (shape[0], self.feature_dim, *shape[2:])
        if tuple(teacher_features.shape) not in {pooled, dense}:
            expected = f"{pooled}" if pooled == dense else f"{pooled} or {dense}"
            raise ValueError(f"teacher_features must have shape {expected}, got {tuple(teacher_features.shape)}")


def reads_features(guide: nn.Module) -> bool:
    """Return whether a guide, of this package or not, takes the teacher's features beside its logits."""
    if hasattr(guide, "feature_dim"):
        return bool(guide.feature_dim)
    inputs = inspect.signature(guide.forward).parameters.values()
    several = any(each.kind is each.VAR_POSITIONAL for each in inputs)
    return several or sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in inputs) > 1


def _bounded(logits: Tensor) -> Tensor:
    """Clamp what is far below the largest of its row; NaN stays NaN."""
    return torch.maximum(logits, logits.amax(1, keepdim=True) - _SPAN).clamp(-_LARGEST, _LARGEST)
