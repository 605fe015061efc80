"""Distillation methods beside DiSK itself, one file each, all weighted by the guide in the same way (``guided``)."""

from .dkd import DKD
from .guided import Guided, GuidedTerms
from .method import Method, Outputs, Pair
from .simkd import SimKD

__all__ = ["DKD", "METHODS", "Guided", "GuidedTerms", "Method", "Outputs", "Pair", "SimKD"]

METHODS: dict[str, type[Method]] = {"simkd": SimKD, "dkd": DKD}  # by the name that launchers know
