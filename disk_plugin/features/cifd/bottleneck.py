"""The information bottleneck of CIFD: noise between a student's features and its classifier, in training only."""

import warnings

import torch
from torch import Tensor, nn

from ... import _checks
from ...functional._positions import promote
from .density import FactorizedDensity

_NOISE_STD = 12**-0.5  # of uniform noise of width 1
_LEAST_STD = 0.1  # of features, in units of the noise's width, below which it drowns them


class InformationBottleneck(nn.Module):
    """Adds uniform noise to features in training, and charges what still passes: CIFD, NeurIPS 2024, section 3.2.

    **This module has parameters**, its density's: give them to an optimizer. It stands between the student's features
    and its classifier; in evaluation mode, and so at inference, it returns the features as they are.

    Args:
        dim: D, width of the features.
        gain: the noise has width 1 / gain. The paper's is 1, for features whose standard deviation is about 1.

    Shape:
        features (N, D); returns the same shape, in float32 at least in training mode.

    Raises:
        ValueError: values out of range; in ``forward``, features of another width.

    Warns:
        UserWarning: in the first training batch, features with a standard deviation below 0.1 / gain.

    Examples:
        >>> bottleneck = InformationBottleneck(16)
        >>> noisy = bottleneck(torch.rand(4, 16))
        >>> noisy.shape, bottleneck.rate(noisy).shape
        (torch.Size([4, 16]), torch.Size([4]))
    """

    def __init__(self, dim: int, *, gain: float = 1.0) -> None:
        super().__init__()
        _checks.integer("dim", dim, at_least=1)
        _checks.number("gain", gain, above=0)
        self.dim, self.gain = int(dim), float(gain)
        self.density = FactorizedDensity(dim)
        self.warned: list[bool] = []  # a list, which replicas share

    def forward(self, features: Tensor) -> Tensor:
        """Return noisy features in training mode, else the same object."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape (N, {self.dim}), got {tuple(features.shape)}")
        if not self.training:
            return features
        (features,) = promote(features)
        if not self.warned and not torch.compiler.is_compiling():
            self._warn_of_spread(features.detach())
        return features + (torch.rand_like(features) - 0.5) / self.gain

    def rate(self, noisy: Tensor) -> Tensor:
        """Return the rate of each sample, summed over channels, nats: (N, D) -> (N,)."""
        return self.density.rate(self.gain * noisy).sum(1)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"dim={self.dim}, gain={self.gain}"

    def _warn_of_spread(self, features: Tensor) -> None:
        if len(features) < 2 or features.is_meta or (features.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self.warned.append(True)
        std = features.var(0).mean().sqrt().item()
        if std * self.gain < _LEAST_STD:
            advice = f"unless training widens them, give gain={0.5 / std:.2g}" if std > 0 else "they carry nothing"
            warnings.warn(
                f"the bottleneck's noise drowns the student's features: their standard deviation is {std:.2g} in this "
                f"batch, the noise's {_NOISE_STD / self.gain:.2g}; {advice}",
                stacklevel=3,
            )
