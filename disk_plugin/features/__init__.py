"""Distillation methods beside DiSK itself, one file each, and ``Guided``, which weights any of them by the guide."""

from .guided import Guided, GuidedTerms  # isort: skip
from .cifd import CIFD
from .dkd import DKD
from .method import Method, Outputs, Pair
from .pairs import pair_of
from .scalekd import ScaleKD
from .simkd import SimKD

__all__ = [
    "CIFD",
    "DKD",
    "METHODS",
    "Guided",
    "GuidedTerms",
    "Method",
    "Outputs",
    "Pair",
    "ScaleKD",
    "SimKD",
    "pair_of",
]

METHODS: dict[str, type[Method]] = {
    "simkd": SimKD,
    "dkd": DKD,
    "cifd": CIFD,
    "scalekd": ScaleKD,
}  # by their name in flags and configurations
