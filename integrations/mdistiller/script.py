"""The training script: the host's own, or its steps, for a fork whose script takes only its own distillers."""

import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

PLAIN = "plain"


class ScriptError(Exception):
    """The host's script ended before any training; the message says where and why."""


def check_script(path: Path) -> None:
    """Validate that a script trains in one process.

    Raises:
        ValueError: it wraps the distiller in DistributedDataParallel.
    """
    if "DistributedDataParallel" in path.read_text(errors="replace"):
        raise ValueError(
            f"{path} trains by DistributedDataParallel, whose processes this launcher does not start: --script plain "
            f"trains in one process, or name another script of the checkout by --script FILE"
        )


def run_script(root: Path, script: str, config: Path, folder: Path, *, resume: bool) -> None:
    """Run the script with a configuration that is complete.

    Raises:
        ScriptError: it ended before the trainer began to train.
    """
    from . import complete_trainer

    complete_trainer.FOLDER[:] = [str(folder)]
    complete_trainer.STARTED.clear()
    sys.argv = [str(root / script), "--cfg", str(config), *(["--resume"] if resume else [])]
    try:
        if script == PLAIN:
            train(config, resume=resume)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception as error:
        if complete_trainer.STARTED:
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(root) in frame.filename]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
        raise ScriptError(
            f"the host's {script} ended before any training, by {type(error).__name__}: {error}{where}"
            f"{'' if script == PLAIN else ' (--script plain takes the steps of the original one instead)'}"
        ) from error


def train(config: Path, *, resume: bool) -> None:
    """Take the steps of the original ``tools/train.py``: loaders, models, distiller, trainer."""
    from mdistiller.distillers import distiller_dict
    from mdistiller.engine import trainer_dict
    from mdistiller.engine.cfg import CFG

    from . import host, loaders

    cfg: Any = CFG
    cfg.merge_from_file(str(config))
    cfg.freeze()
    found, kind = loaders.load(cfg), cfg.DISTILLER.TYPE
    if kind == "NONE":
        arguments: list[Any] = [host.build_model(cfg, cfg.DISTILLER.STUDENT)]
    else:
        teacher = host.build_teacher(cfg)
        arguments = [host.build_model(cfg, cfg.DISTILLER.STUDENT), teacher, cfg]
        arguments += [found.num_data] if kind == "CRD" else []
    distiller = torch.nn.DataParallel(distiller_dict[kind](*arguments).cuda())
    name = os.path.join(cfg.EXPERIMENT.PROJECT, cfg.EXPERIMENT.NAME)
    trainer_dict[cfg.SOLVER.TRAINER](name, distiller, found.train, found.val, cfg).train(resume=resume)
