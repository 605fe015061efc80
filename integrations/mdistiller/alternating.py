"""Algorithm 1 of the section ``DISK.ALTERNATING``: its passes, its recipe and the guide's own optimizer."""

import torch
from yacs.config import CfgNode

from disk_plugin import DiSKLoss
from disk_plugin.training import Recipe


def check_passes(cfg: CfgNode) -> None:
    """Validate the numbers of passes.

    Raises:
        ValueError: too few.
    """
    for name, least in (("GUIDE_PASSES", 1), ("STUDENT_PASSES", 1), ("GUIDE_WARMUP_EPOCHS", 0)):
        if cfg.DISK.ALTERNATING[name] < least:
            raise ValueError(f"DISK.ALTERNATING.{name} must be >= {least}, got {cfg.DISK.ALTERNATING[name]}")


def build_guide_optimizer(cfg: CfgNode, disk: DiSKLoss) -> torch.optim.Optimizer:
    """Turn ``cfg.DISK.ALTERNATING`` into the guide's own optimizer.

    Raises:
        ValueError: an unknown optimizer.
    """
    settings = cfg.DISK.ALTERNATING
    if settings.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            disk.parameters(), settings.LR, momentum=settings.MOMENTUM, weight_decay=settings.WEIGHT_DECAY
        )
    if settings.OPTIMIZER == "Adam":
        return torch.optim.Adam(disk.parameters(), settings.LR, weight_decay=settings.WEIGHT_DECAY)
    raise ValueError(f"DISK.ALTERNATING.OPTIMIZER must be SGD or Adam, got {settings.OPTIMIZER!r}")


def build_recipe(cfg: CfgNode) -> Recipe:
    """Turn ``cfg.DISK.ALTERNATING`` into Algorithm 1's recipe; a record is read in the host's batch size."""
    settings = cfg.DISK.ALTERNATING
    return Recipe(
        guide_passes=settings.GUIDE_PASSES,
        student_passes=settings.STUDENT_PASSES,
        guide_warmup_passes=settings.GUIDE_WARMUP_EPOCHS,
        replay=bool(settings.REPLAY),
        replay_capacity=settings.REPLAY_CAPACITY,
        replay_batch_size=cfg.SOLVER.BATCH_SIZE,
    )
