"""Distillation methods beside DiSK itself, one file each, and ``Guided``, which weights any of them by the guide."""

from .guided import Guided, GuidedTerms  # isort: skip
from .cifd import CIFD
from .dkd import DKD
from .method import Method, Outputs, Pair
from .simkd import SimKD

__all__ = ["CIFD", "DKD", "METHODS", "Guided", "GuidedTerms", "Method", "Outputs", "Pair", "SimKD"]

METHODS: dict[str, type[Method]] = {
    "simkd": SimKD,
    "dkd": DKD,
    "cifd": CIFD,
}  # by their name in flags and configurations
