"""A learned density per channel and the rate that it charges: Ballé et al. (ICLR 2018), appendix 6.1."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ... import _checks
from ..._modes import without_autocast
from ...functional._positions import promote


class FactorizedDensity(nn.Module):
    r"""The probability of unit-wide bins under a learned density per channel, the same for every sample.

    **This module has parameters**: give them to an optimizer. Each channel has a monotone scalar network $\ell$, whose
    sigmoid is the cumulative distribution, so that a value $v$ has the probability
    $p(v) = \sigma(\ell(v + \tfrac12)) - \sigma(\ell(v - \tfrac12))$ (Ballé et al., ICLR 2018, appendix 6.1).

    The rate $-\log p$ is evaluated from the logits, in which neither tail rounds to 0. So it needs no lower bound of
    p, whose gradient would be 0 for the values that most need one.

    Args:
        channels: C.
        hidden_dims: widths of the network's hidden layers.
        init_scale: half the width of the initial density, in units of the values.

    Shape:
        values (..., C); returns the same shape. Half precision is upcast to float32.

    Raises:
        ValueError: sizes that are not positive; in a call, another number of channels.

    Examples:
        >>> density = FactorizedDensity(4)
        >>> density.rate(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, channels: int, hidden_dims: tuple[int, ...] = (3, 3, 3), init_scale: float = 10.0) -> None:
        super().__init__()
        _checks.integer("channels", channels, at_least=1)
        for width in hidden_dims:
            _checks.integer("hidden_dims", width, at_least=1)
        _checks.number("init_scale", init_scale, above=0)
        self.channels = int(channels)
        widths = (1, *hidden_dims, 1)
        scale = init_scale ** (1 / (len(widths) - 1))
        self.layers = len(widths) - 1
        for i, (width_in, width_out) in enumerate(pairwise(widths)):
            # softplus of it is 1 / (scale * width_out): a slope of 1 / init_scale through all layers
            entry = math.log(math.expm1(1 / (scale * width_out)))
            self.register_parameter(f"matrix{i}", nn.Parameter(torch.full((channels, width_out, width_in), entry)))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.rand(channels, width_out, 1) - 0.5))
            if i + 1 < self.layers:
                self.register_parameter(f"factor{i}", nn.Parameter(torch.zeros(channels, width_out, 1)))

    def cumulative_logits(self, values: Tensor) -> Tensor:
        """Return the logits of the cumulative distributions, strictly increasing in each value."""
        if values.ndim < 1 or values.shape[-1] != self.channels:
            raise ValueError(f"values must have shape (..., {self.channels}), got {tuple(values.shape)}")
        with without_autocast(values):
            (values,) = promote(values)
            return self._logits(values.reshape(-1, self.channels).t()).t().reshape(values.shape)

    def rate(self, values: Tensor) -> Tensor:
        """Return -log p of each value, nats."""
        with without_autocast(values):
            (values,) = promote(values)
            lower, upper = self.cumulative_logits(torch.stack([values - 0.5, values + 0.5]))
            # p = sigmoid(upper) sigmoid(-lower) (1 - exp(lower - upper)); equal logits are rounding, far outside
            width = (upper - lower).clamp(min=torch.finfo(upper.dtype).tiny)
            return softplus(-upper) + softplus(lower) - torch.log(-torch.expm1(-width))

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"channels={self.channels}"

    def _logits(self, values: Tensor) -> Tensor:
        """(C, M) -> (C, M)."""
        hidden = values.unsqueeze(1)
        for i in range(self.layers):
            bias, matrix = (getattr(self, f"{name}{i}").to(hidden.dtype) for name in ("bias", "matrix"))
            hidden = torch.baddbmm(bias, softplus(matrix), hidden)
            if i + 1 < self.layers:
                hidden = torch.addcmul(hidden, getattr(self, f"factor{i}").to(hidden.dtype).tanh(), hidden.tanh())
        return hidden.squeeze(1)
