"""KD dropout: which teachers a training batch is without. Origin: DGKD (Son et al., ICCV 2021)."""

import torch
from torch import Tensor, nn

from ... import _checks


class SourceDropout(nn.Module):
    """Leaves out whole sources of distillation, each with the same probability, anew in each training batch.

    The draws are a function of a counter and the seed: equal in all processes, without reading a tensor, and the same
    after resuming, as the counter is in the ``state_dict``. What is left is not scaled up.

    Args:
        sources: number of sources.
        probability: of leaving one out, in [0, 1].
        seed: of the draws.

    Shape:
        returns (sources,), 1 for a source that stays and 0 for one that is left out; all 1 in evaluation mode.
    """

    step: Tensor

    def __init__(self, sources: int, probability: float, seed: int = 0) -> None:
        super().__init__()
        _checks.number("dropout", probability, at_least=0, at_most=1)
        _checks.integer("seed", seed)
        self.sources, self.probability, self.seed = sources, float(probability), int(seed)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """Return the mask of this batch, float32."""
        if not self.training or not self.probability:
            return torch.ones(self.sources, device=self.step.device)
        self.step += 1  # in place: DataParallel's first replica shares its storage
        source = torch.arange(self.sources, device=self.step.device)
        return (_uniform(self.step * self.sources + source, self.seed) >= self.probability).float()

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"sources={self.sources}, probability={self.probability}"


def _uniform(counter: Tensor, seed: int) -> Tensor:
    """Hash integers to [0, 1): two rounds of PCG's output function (O'Neill 2014) on 32 bits."""
    word = (counter + (seed % 2**31) * 0x9E3779B9) & 0xFFFFFFFF
    for _ in range(2):
        state = (word * 747796405 + 2891336453) & 0xFFFFFFFF
        word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) & 0xFFFFFFFF
        word = (word >> 22) ^ word
    return (word >> 8).float() / 2**24  # exact in float32
