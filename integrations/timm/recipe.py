"""The settings of Algorithm 1's alternation in timm: how the passes alternate, and the guide's own optimizer."""

from dataclasses import dataclass

from disk_plugin import training
from disk_plugin.presets import PAPER

_PAPER = PAPER["recipe"]


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """``disk_plugin.training.Recipe`` with the guide's own optimizer; defaults are the paper's.

    Attributes:
        guide_opt: the guide's optimizer, by timm's name.
        guide_lr: its learning rate, which falls to 0 as a cosine over the epochs.
        guide_momentum: its momentum.
        guide_weight_decay: its weight decay.
    """

    guide_opt: str = _PAPER["optimizer"]
    guide_lr: float = _PAPER["lr"]
    guide_momentum: float = _PAPER["momentum"]
    guide_weight_decay: float = _PAPER["weight_decay"]
