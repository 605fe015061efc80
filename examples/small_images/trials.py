"""The settings that are searched, as many for KD as for DiSK, and what was screened beside them to see the guide."""

from typing import Any

Settings = dict[str, Any]

KD_TRIALS: list[Settings] = [
    {"ce_weight": ce_weight, "temperature": temperature}
    for ce_weight, temperature in (
        *((0.0, 1.0), (0.0, 2.0), (0.0, 4.0), (0.1, 2.0)),
        *((0.1, 4.0), (0.5, 2.0), (0.5, 4.0), (0.9, 4.0)),
    )
]
_TIGHT: Settings = {"multiplier": 50.0, "budget": 0.1}  # enforced from the first step on
_SMALL_K: Settings = {"teacher_target": "scaffolded", "scaffold_label": True}
DISK_TRIALS: list[Settings] = [
    {"ce_weight": 0.1},  # the package's defaults; the budget is the warm start's error
    {"ce_weight": 0.1, "temperature": 2.0},
    {"ce_weight": 0.1, **_TIGHT},
    {"ce_weight": 0.1, "temperature": 2.0, **_TIGHT},
    {"ce_weight": 0.5, "temperature": 2.0, **_TIGHT},
    {"ce_weight": 0.1, "multiplier": 1000.0, "budget": 0.02},
    {"ce_weight": 0.1, "top_k": 5, **_SMALL_K, **_TIGHT},
    {"ce_weight": 0.1, "top_k": 20, **_SMALL_K},
]
SCREEN: dict[str, tuple[str, Settings]] = {
    "alternating": ("disk-alternating", {"ce_weight": 0.1}),
    "top-20, full target": ("disk", {"ce_weight": 0.1, "top_k": 20}),  # the paper's
    "guide reads logits alone": ("disk", {"ce_weight": 0.1, "guide_inputs": "logits"}),
    "official_cifar": (
        "disk",
        {
            "ce_weight": 0.1,
            "variant": "official_cifar",
            "top_k": 10,
            "student_temperature": 3.5,
            "multiplier": (1.0, 5.0),
            "budget": 0.5,
        },
    ),
    "official_imagenet": (
        "disk",
        {
            "ce_weight": 0.5,
            "variant": "official_imagenet",
            "top_k": 20,
            "temperature": 1.0,
            "multiplier": (0.1, 0.5),
            "budget": 0.2,
        },
    ),
}
