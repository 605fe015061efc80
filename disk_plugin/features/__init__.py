"""Distillation methods beside DiSK itself, one file each, and ``Guided``, which weights any of them by the guide."""

from .dkd import DKD
from .guided import Guided, GuidedTerms
from .method import Method, Outputs, Pair
from .simkd import SimKD

__all__ = ["DKD", "METHODS", "Guided", "GuidedTerms", "Method", "Outputs", "Pair", "SimKD"]

METHODS: dict[str, type[Method]] = {"simkd": SimKD, "dkd": DKD}  # by their name in flags and configurations
