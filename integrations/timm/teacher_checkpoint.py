"""A teacher from a file, built with the arguments of the run that trained it, which train.py saves."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from timm.models import create_model
from timm.models import load_state_dict as read_state_dict
from timm.utils import unwrap_model
from torch import Tensor, nn

from disk_plugin.features import METHODS


def load_teacher(name: str, checkpoint: str, student: nn.Module, **factory: Any) -> nn.Module:
    """Build a teacher by name, with the student's classes and channels, and a file's weights; no network access.

    A checkpoint of timm's train.py holds its run's arguments. Those of the model (``--model-kwargs``, ``--gp``,
    ``--bn-eps``) and of its images (``--mean``, ``--std``) are used.

    Raises:
        ValueError: not a checkpoint, or one for other classes, channels or another model.
        OSError: no such file.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"expected the teacher's weights, found no file {checkpoint}")
    student = unwrap_model(student)
    try:
        with arguments_allowed():
            weights = read_state_dict(checkpoint)
        trained = get_arguments(read(checkpoint))
    except (RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"expected the teacher's weights, got {checkpoint}, which cannot be loaded: {error}"
        ) from error
    if trained.get("split_bn"):  # the other parts of a batch had statistics of their own, which inference does not use
        weights = {key: value for key, value in weights.items() if ".aux_bn." not in key}
    built = {"global_pool": trained.get("gp"), "bn_eps": trained.get("bn_eps"), **(trained.get("model_kwargs") or {})}
    # overrides the run's own: the teacher has to fit the student's classes and channels, which is checked next
    built |= {"pretrained": False, "num_classes": student.num_classes, "in_chans": student.in_chans, **factory}
    overlay = {key: tuple(trained[key]) for key in ("mean", "std") if trained.get(key) is not None}
    name_there = _full_name(name, trained.get("model"), checkpoint)
    teacher = create_model(name_there, pretrained_cfg_overlay=overlay, **built)
    _check_fit(weights, teacher, checkpoint)
    try:
        teacher.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights in {checkpoint} do not fit the teacher {name}: {error}") from error
    return teacher


def read(path: str) -> dict[str, Any]:
    """Read a checkpoint as the host does; it holds the run's arguments.

    Safe for files of others from torch 2.6 on: before, they can get round ``weights_only`` (CVE-2025-32434).
    """
    if path.endswith(".safetensors"):  # weights alone
        return {}
    with arguments_allowed():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint if isinstance(checkpoint, dict) else {}


@contextmanager
def arguments_allowed() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` take argparse.Namespace, and nothing else that it refuses, in the block.

    For the host's readers too, which allow it only where torch has ``safe_globals``: what this is, from torch 2.5 on.
    """
    before = list(torch.serialization.get_safe_globals())  # a copy: torch 2.4 returns the list that it adds to
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def get_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the run that wrote a checkpoint, empty if it holds none."""
    arguments = checkpoint.get("args")
    if isinstance(arguments, argparse.Namespace):
        return vars(arguments)
    return dict(arguments) if isinstance(arguments, Mapping) else {}


def _full_name(name: str, trained: str | None, checkpoint: str) -> str:
    """Return the name that the checkpoint's run used; its tag, after the dot, decides how images are normalised.

    Raises:
        ValueError: another architecture than ``name``.
    """
    if trained is None or ":" in name or ":" in trained:  # of a hub or a folder, whose names may differ
        return name
    if trained.split(".")[0] != name.split(".")[0]:
        raise ValueError(f"{checkpoint} must hold the teacher {name} (--kd-model-name), got the weights of {trained}")
    return trained


def _check_fit(weights: Mapping[str, Tensor], teacher: Any, checkpoint: str) -> None:
    """Raise ValueError with a short reason, where loading would list mismatched tensors."""
    parts = {key.split(".")[0] for key in weights}
    if "student" in parts and len(parts) > 1:  # of a MethodModel
        names = [METHODS[part].__name__ if part in METHODS else part for part in sorted(parts - {"student"})]
        raise ValueError(
            f"{checkpoint} must hold a model that predicts by itself, got a student of {names[0]}, whose own head is "
            f"untrained: it predicts through the method's layers"
        )
    built = teacher.state_dict()
    for layer, dimension, what in (("classifier", 0, "classes"), ("first_conv", 1, "channel(s)")):
        names = teacher.pretrained_cfg.get(layer)
        key = f"{names[0] if isinstance(names, tuple | list) else names}.weight"
        if key not in weights or key not in built or weights[key].ndim <= dimension:
            continue
        found, expected = weights[key].shape[dimension], built[key].shape[dimension]
        if found != expected:
            raise ValueError(f"the teacher in {checkpoint} has {found} {what}, the student {expected}")
