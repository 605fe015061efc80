"""``DISK.BUDGET estimate``: the warm start's error on training images that are held out, measured before training."""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from yacs.config import CfgNode

from disk_plugin.schedule import estimate_budget

from . import loaders
from .checkpoints import load_weights, warm_start_weights
from .host import build_model
from .runs import SETTINGS
from .settings import is_guided

ESTIMATE = "estimate"
_SHARE = 0.1  # of the training images, where DATASET.HELD_OUT does not say
_FILE = "budget.yaml"


def check_estimate(cfg: CfgNode) -> None:
    """Validate that there is something to estimate the budget from.

    Raises:
        ValueError: there is not.
    """
    if not is_guided(cfg):
        raise ValueError(f"DISK.BUDGET estimate needs a distiller with a guide, got {cfg.DISTILLER.TYPE}")
    if not cfg.DISTILLER.WARM_START:
        raise ValueError(
            "DISK.BUDGET estimate needs DISTILLER.WARM_START FILE: the budget is the error of a student that was "
            "trained by --distiller NONE"
        )


def estimated(cfg: CfgNode) -> tuple[float, str]:
    """Return the warm start's error on the held-out images, in the test's transform, and a note that says so."""
    student = build_model(cfg, cfg.DISTILLER.STUDENT)
    load_weights(student, warm_start_weights(cfg), "DISTILLER.WARM_START", "student")
    found, share = loaders.load(cfg), cfg.DATASET.HELD_OUT or _SHARE
    images = found.train.dataset
    images = images.dataset if cfg.DATASET.HELD_OUT else images  # the loader's are what is left
    if not hasattr(images, "transform") or not hasattr(found.val.dataset, "transform"):
        raise ValueError("DISK.BUDGET estimate needs datasets with a transform, to show training images as in the test")
    shown: Any = copy.copy(images)
    for name in ("transform", "transforms"):  # the second is what some datasets of torchvision read
        if hasattr(found.val.dataset, name):
            setattr(shown, name, getattr(found.val.dataset, name))
    chosen = loaders.held_out(len(images), share)
    loader = DataLoader(Subset(shown, chosen), found.val.batch_size or 64, num_workers=found.train.num_workers)
    error = estimate_budget(student.cuda(), _pairs(loader))
    note = (
        f"DISK.BUDGET estimate: {error:.4f}, the warm start's error on {len(chosen)} of {len(images)} training images"
    )
    if not _was_held_out(cfg.DISTILLER.WARM_START, share):
        note += (
            f"; its run does not say that it left them out, and on images that it has seen the error is too small: "
            f"train it by --distiller NONE DATASET.HELD_OUT {share:g}"
        )
    return error, note


def record(folder: Path, budget: float, note: str) -> None:
    """Write the budget to a new run's folder and log."""
    (folder / _FILE).write_text(yaml.safe_dump({"budget": budget, "how": note}))
    with (folder / "worklog.txt").open("a") as log:
        log.write(f"{note}\n")


def recorded(folder: Path) -> float:
    """Return the estimated budget of a resumed run.

    Raises:
        FileNotFoundError: it has none.
    """
    if not (folder / _FILE).is_file():
        raise FileNotFoundError(f"--resume needs the estimated budget of the run, found no {folder / _FILE}")
    return float(yaml.safe_load((folder / _FILE).read_text())["budget"])


def _pairs(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for image, target, *_ in loader:
        yield image.float(), target


def _was_held_out(checkpoint: str, share: float) -> bool:
    path = Path(checkpoint).with_name(SETTINGS)
    settings = yaml.safe_load(path.read_text()) if path.is_file() else None
    return isinstance(settings, dict) and settings.get("DATASET.HELD_OUT") == share
