"""Evaluate a checkpoint as the host's ``tools/eval.py`` does, also those that need SimKD's projector."""

from pathlib import Path

import torch
from yacs.config import CfgNode

from .checkpoints import load_file, load_weights, read_student, simkd_student
from .epoch_files import in_force
from .host import build_model

_FILES = {"best": "student_best", "latest": "student_latest"}
_SIMKD_FILES = {"best": "simkd_best", "latest": "simkd_latest"}


def checkpoint_path(cfg: CfgNode, which: str, folder: Path | None) -> Path:
    """Return the file that ``--evaluate`` means: a path, or ``best`` or ``latest`` of the experiment's folder."""
    if folder is None:
        return Path(which)
    return in_force(folder / (_SIMKD_FILES if "SIMKD" in cfg.DISTILLER.TYPE else _FILES)[which])


def evaluate(cfg: CfgNode, path: Path) -> tuple[float, float, float]:
    """Run the host's validation and return top-1, top-5 (per cent) and cross-entropy.

    ``path`` is a student's checkpoint, a ``simkd_*`` file, or a whole ``latest``, ``best``, ``epoch_N`` of the host.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no student of ``cfg.DISTILLER.STUDENT``, or SimKD's student without its projector.
    """
    from mdistiller.dataset import get_dataset
    from mdistiller.distillers import Vanilla
    from mdistiller.engine.utils import validate

    student = build_model(cfg, cfg.DISTILLER.STUDENT)
    content = load_file(str(path), key="--evaluate")
    if isinstance(content, dict) and "teacher_size" in content:
        student = simkd_student(student, content)
    else:
        if "SIMKD" in cfg.DISTILLER.TYPE:  # whatever the file says: one that is older than the mark says nothing
            raise ValueError(
                f"a student trained by SimKD predicts through projector and teacher's classifier, which are in "
                f"simkd_best and simkd_latest, got {path}"
            )
        weights = read_student(str(path), key="--evaluate")
        load_weights(student, weights, f"--evaluate {path}", f"student {cfg.DISTILLER.STUDENT}")
    _, val_loader, _, _ = get_dataset(cfg)
    top1, top5, loss = validate(val_loader, torch.nn.DataParallel(Vanilla(student).cuda()))
    return float(top1), float(top5), float(loss)
