"""The rows of our Table 1, and the paper's search ranges for them."""

import itertools
from typing import Any

CE, KD_PLAIN, KD, DISK, UNIFORM = ROWS = (
    "CE",
    "KD, temperature 1",
    "KD, searched",
    "DiSK",
    "one g, 1 to 0, no guide",
)
MAIN_ROWS = (CE, KD, DISK, UNIFORM)  # of the summary

KD_RANGES: dict[str, list[Any]] = {  # A.1's, except ce_weight 1, which is CE
    "ce_weight": [0.0, 0.1, 0.5, 0.9],
    "temperature": [1.0, 2.0, 4.0],
    "student_temperature": [1.0, 2.0, 4.0],
}
DISK_RANGES: dict[str, list[Any]] = {  # A.1's; "guide." is what it leaves open
    "ce_weight": [0.0, 0.1, 0.5],
    "temperature": [1.0, 2.0, 4.0],
    "student_temperature": [1.0, 2.0, 4.0],
    "top_k": [1, 2, 3],
    "multiplier_min": [0.01, 0.1, 1.0, 5.0, 10.0],
    "multiplier_max": [1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0],
    "budget": [0.0, 0.05, 0.1],
    "period": [20, 50],
    "guide.lr": [0.01, 0.03, 0.1],
    "guide.hidden_dims": [(2,), (16, 16)],
    "guide.norm": ["layer", "batch"],
    "guide.gradient_scale": [None, 0.3],
    "guide.inputs": ["both", "features"],
}


def grid(ranges: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return all settings in the ranges."""
    return [dict(zip(ranges, values, strict=True)) for values in itertools.product(*ranges.values())]
