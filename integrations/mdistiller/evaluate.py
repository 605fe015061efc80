"""Evaluate a checkpoint as the host's ``tools/eval.py`` does, also of methods that predict."""

from pathlib import Path
from typing import Any

import torch
from mdistiller.distillers import distiller_dict
from torch import Tensor, nn
from yacs.config import CfgNode

from disk_plugin.features import METHODS

from . import loaders
from .checkpoints import deployed_method, deployed_student, load_file, load_weights, read_student
from .distillers import predicting_method
from .epoch_files import current_file
from .feature_maps import outputs_of
from .host import build_model


def checkpoint_path(cfg: CfgNode, which: str, folder: Path | None) -> Path:
    """Return the file for ``--evaluate``: a path, or ``best`` or ``latest`` of the experiment's folder."""
    if folder is None:
        return Path(which)
    return current_file(folder / f"{_method(cfg) or 'student'}_{which}")


def evaluate(cfg: CfgNode, path: Path) -> tuple[float, float, float]:
    """Run the host's validation and return top-1, top-5 (per cent) and cross-entropy.

    ``path`` is a checkpoint of a student, of a method that predicts, or of a whole run (the host's ``latest``, ``best``
    or ``epoch_N``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no student of ``cfg.DISTILLER.STUDENT``, or a student without the method that predicts.
    """
    from mdistiller.engine.utils import validate

    student = build_model(cfg, cfg.DISTILLER.STUDENT)
    content = load_file(str(path), key="--evaluate")
    saved, method = deployed_method(content), _method(cfg)
    if saved is not None:
        student = deployed_student(student, saved, content)
    else:
        if method is not None:  # even if the file has no mark: older versions wrote none
            raise ValueError(
                f"a student trained by {METHODS[method].__name__} predicts through the method's own layers, which are "
                f"in {method}_best and {method}_latest, got {path}"
            )
        weights = read_student(str(path), key="--evaluate")
        load_weights(student, weights, f"--evaluate {path}", f"student {cfg.DISTILLER.STUDENT}")
    top1, top5, loss, *_ = validate(loaders.load(cfg).val, torch.nn.DataParallel(_Alone(student).cuda()))
    return float(top1), float(top5), float(loss)


class _Alone(nn.Module):
    """A student as the host's ``validate`` calls it, whatever the host calls a distiller without a teacher."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor, **_: Any) -> Tensor:
        return outputs_of(self.student, image)[0]


def _method(cfg: CfgNode) -> str | None:
    return predicting_method(distiller_dict[cfg.DISTILLER.TYPE])
