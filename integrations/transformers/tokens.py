"""Token outputs and labels in the layout of the loss."""

import torch
from torch import Tensor

from disk_plugin.features import Outputs


def positions_last(shown: Outputs, causal: bool) -> Outputs:
    """Turn token outputs (N, L, C) into (N, C, L), of a causal model without the last position."""
    features = None if shown.features is None else _tokens_last(shown.features, causal)
    return shown._replace(logits=_tokens_last(shown.logits, causal), features=features)


def _tokens_last(value: Tensor, causal: bool) -> Tensor:
    if value.ndim != 3:
        return value
    value = value.movedim(-1, 1)
    return value[..., :-1] if causal else value


def aligned(target: Tensor, causal: bool) -> Tensor:
    """Turn labels (N, L, C) into (N, C, L); those of a causal model belong to the position before."""
    if target.ndim == 3:
        target = target.movedim(-1, 1)
    return target[..., 1:] if causal else target


def count(target: Tensor, ignore_index: int) -> Tensor:
    """Return the number of labels that are not ignored, a scalar."""
    if target.is_floating_point():
        return torch.tensor(float(target.numel() // target.shape[1]), device=target.device)
    return (target != ignore_index).sum().float()
