"""Closed-form gradients: double backward is not supported."""

from typing import Any

import torch
from torch import Tensor


class _FirstOrder(torch.autograd.Function):
    """Identity whose backward raises; torch's ``once_differentiable`` would return 0 for a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "double backward is not supported, as DiSK's gradients are in closed form: for second derivatives use "
            "functional.reference_terms, the same in plain autograd"
        )


def first_order(gradient: Tensor, source: Tensor) -> Tensor:
    """Make double backward raise for the gradient w.r.t. ``source``, if the backward is recorded (``create_graph``)."""
    if torch.is_grad_enabled():
        gradient = _FirstOrder.apply(gradient, source)
    return gradient
