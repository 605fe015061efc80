"""Rows of the report, trials of the search (equally many for KD and DiSK), further ones, regimes."""

from typing import Any, NamedTuple

from disk_plugin import presets

Settings = dict[str, Any]

CONVERGED = ("ce", "kd", "kd-1", "disk", "uniform", "uniform-constant", "paper-replay", "searched")


def rows(temperature: float) -> dict[str, tuple[str, Settings]]:
    """Return the report's rows, except methods that use the search's settings.

    ``temperature`` is the best for KD: the only setting of the package's default form.
    """
    default: Settings = {"loss": {"temperature": temperature}}
    searched = {key: presets.CIFAR100_SEARCHED[key] for key in ("guide", "loss", "dual")}
    paper = {key: presets.PAPER[key] for key in ("guide", "loss", "dual")}
    paper["loss"] = paper["loss"] | {"budget": "error"}
    return {
        "kd-1": ("kd", {"ce_weight": 0.0, "temperature": 1.0}),
        "disk": ("disk", default),
        "uniform": ("disk", {**default, "guide": {"kind": "uniform", "discount": "auto"}}),
        "uniform-constant": ("disk", {**default, "guide": {"kind": "uniform", "value": 0.03}}),
        # the preset's gradient is not scaled: under the student's SGD its guide would saturate and die
        "paper-replay": ("disk-replay", {**paper, "guide_optimizer": "adam"}),
        "searched": ("disk", searched),
    }


KD_TRIALS: list[Settings] = [
    {"ce_weight": ce_weight, "temperature": temperature}
    for ce_weight, temperature in (
        *((0.0, 1.0), (0.0, 2.0), (0.0, 4.0), (0.1, 2.0)),
        *((0.1, 4.0), (0.5, 2.0), (0.5, 4.0), (0.9, 4.0)),
    )
]
_TIGHT: Settings = {"multiplier": 50.0, "budget": 0.1}  # enforced from the first step on
SMALL_K: Settings = {"teacher_target": "scaffolded", "scaffold_label": True}
DISK_TRIALS: list[Settings] = [
    {"ce_weight": 0.1},  # the package's defaults; the budget is the warm start's error
    {"ce_weight": 0.1, "temperature": 2.0},
    {"ce_weight": 0.1, **_TIGHT},
    {"ce_weight": 0.1, "temperature": 2.0, **_TIGHT},
    {"ce_weight": 0.5, "temperature": 2.0, **_TIGHT},
    {"ce_weight": 0.1, "multiplier": 1000.0, "budget": 0.02},
    {"ce_weight": 0.1, "top_k": 5, **SMALL_K, **_TIGHT},
    {"ce_weight": 0.1, "top_k": 20, **SMALL_K},
]
_DISK: dict[str, Settings] = {
    "auto": {"loss": {"temperature": 2.0}},  # the default form at KD's best temperature
    "tight": {key: presets.CIFAR100_SEARCHED[key] for key in ("guide", "loss", "dual")},  # DiSK's best
}
_CIFD: list[Settings] = [
    {"embedding_weight": 100.0},  # the paper's weights
    {"embedding_weight": 10.0},
    {"embedding_weight": 1.0},
    {"embedding_weight": 100.0, "rate_weight": 0.0005},
    {"embedding_weight": 10.0, "rate_weight": 0.0005},
    {"embedding_weight": 10.0, "gain": 3.0},
    {"embedding_weight": 10.0, "temperature": 4.0},
    {"embedding_weight": 10.0, "ce_weight": 0.1},
]
# second round, as the first was best at its edge, with the smallest weight: guided (8 trials) and alone (4 more)
_LIGHT: list[Settings] = [{"embedding_weight": weight, "gain": gain} for weight in (1.0, 0.1) for gain in (1.0, 4.0)]
CIFD_TRIALS: dict[str, tuple[str, Settings]] = {
    **{f"cifd {i}": ("cifd", settings) for i, settings in enumerate(_CIFD)},
    **{
        f"disk-cifd {name} {i}": ("disk-cifd", {**disk, "cifd": light})
        for name, disk in _DISK.items()
        for i, light in enumerate(_LIGHT)
    },
    **{f"cifd {8 + i}": ("cifd", light) for i, light in enumerate([*_LIGHT[1:], {**_LIGHT[1], "ce_weight": 0.1}])},
}
_AS_DISK: Settings = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 2.0}  # the logits' losses beside a guide


def _views(factor: float) -> Settings:
    """Return ScaleKD's weights of both views, the package's defaults (about the paper's) times a factor."""
    return {"original_weight": 4 * factor, "dc_removed_weight": round(3 * factor, 4)}


SCALEKD_TRIALS: list[Settings] = [
    _views(1.0),
    _views(0.1),
    {**_views(0.1), **_AS_DISK},
    {**_views(0.01), **_AS_DISK},
    _views(0.01),
    {**_views(1.0), **_AS_DISK},
    {**_views(0.1), **_AS_DISK, "norm": "layer"},
    {**_views(0.1), "ce_weight": 0.0, "kd_weight": 1.0},
]
DISK_SCALEKD_TRIALS: list[Settings] = [
    *({**disk, "scalekd": _views(factor)} for factor in (0.1, 0.01) for disk in _DISK.values()),
    *({**disk, "scalekd": _views(1.0)} for disk in _DISK.values()),
    *({**disk, "scalekd": {**_views(0.1), "weighted_views": "dc_removed"}} for disk in _DISK.values()),
]


def named(method: str, settings: list[Settings], count: int | None = None) -> dict[str, tuple[str, Settings]]:
    """Return the first trials of a method by name."""
    return {f"{method} {i}": (method, each) for i, each in enumerate(settings[:count])}


BEST: Settings = {"ce_weight": 0.1, "temperature": 2.0, **_TIGHT}  # the search's choice; one change at a time below
SCREEN: dict[str, tuple[str, Settings]] = {
    "alternating": ("disk-alternating", BEST),
    "budget on the discount, .1": ("disk-discount-budget", BEST),
    "top-20": ("disk", {**BEST, "top_k": 20}),
    "top-20, target zeroed outside": ("disk", {**BEST, "top_k": 20, **SMALL_K}),
    "guide reads logits alone": ("disk", {**BEST, "guide_inputs": "logits"}),
    "guide reads features alone": ("disk", {**BEST, "guide_inputs": "features"}),
    "guide's gradient as it is, Adam": (
        "disk",
        {**BEST, "guide_gradient_scale": None, "guide_optimizer": "adam"},
    ),
    "guide's gradient times 3": ("disk", {**BEST, "guide_gradient_scale": 0.9}),
    "multiplier .1 to 50": ("disk", {**BEST, "multiplier": (0.1, 50.0)}),
    "multiplier 10 to 50": ("disk", {**BEST, "multiplier": (10.0, 50.0)}),
    "budget 1 to .05": ("disk", {**BEST, "budget": (1.0, 0.05)}),
    "budget .02, multiplier 1000": ("disk", {**BEST, "budget": 0.02, "multiplier": 1000.0}),
    "ce_weight 0": ("disk", {**BEST, "ce_weight": 0.0}),
    "temperature 1": ("disk", {**BEST, "temperature": 1.0}),
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
    "alternating on a record": ("disk-replay", BEST),
}
REPEATED = ("alternating", "alternating on a record")  # regardless of their results: does the record change anything?


class Regime(NamedTuple):
    """A regime in which a scaffold might matter: number of images, share of flipped labels, epochs, start."""

    images: int | None = None  # None: all that the search trains on
    wrong_labels: float = 0.0
    epochs: int = 30
    warm_epochs: int = 15  # 0: from scratch


REGIMES = {
    "5,000 images, 60 epochs": Regime(images=5000, epochs=60, warm_epochs=30),
}
