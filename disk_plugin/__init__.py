"""Distilling Scaffolded Knowledge (DiSK, Kag et al., ICLR 2023) for PyTorch training loops."""

from . import functional, presets
from ._version import __version__
from .guide import GuideHead
from .loss import DiSKLoss
from .schedule import DualScheduler

__all__ = ["DiSKLoss", "DualScheduler", "GuideHead", "__version__", "functional", "presets"]
