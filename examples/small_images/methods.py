"""The distillation methods that the examples compare. A new one is a :class:`Method` and a line in ``METHODS``."""

from typing import Any

from .cifd_methods import CIFDAlone, DiSKCIFD
from .disk_methods import AlternatingDiSK, DiscountBudgetDiSK, DiSK, ReplayDiSK
from .method import CE, KD, Batch, Method
from .scalekd_methods import DiSKScaleKD, ScaleKDAlone

__all__ = ["CE", "KD", "METHODS", "Batch", "DiSK", "Method", "make_method"]

METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
    "disk": DiSK,
    "disk-best": DiSK,  # as the search of this pair chose it
    "disk-alternating": AlternatingDiSK,
    "disk-discount-budget": DiscountBudgetDiSK,
    "disk-replay": ReplayDiSK,
    "cifd": CIFDAlone,
    "disk-cifd": DiSKCIFD,
    "scalekd": ScaleKDAlone,
    "disk-scalekd": DiSKScaleKD,
}


def make_method(name: str, settings: dict[str, Any], **run: Any) -> Method:
    """Build a method by name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    return METHODS[name].made(settings, **run)
