"""Mean and standard deviation per channel: of the student's images in this run, of the teacher's in its own."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from timm.task import DistillationTeacher
from timm.utils import unwrap_model
from torch import Tensor, nn

from disk_plugin import _checks


def get_image_statistics(
    student: nn.Module, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (1, C, 1, 1) of the images: as given, else of the student's configuration.

    Raises:
        ValueError: neither one value nor one for each channel; a standard deviation that is not positive.
        TypeError: values that are no numbers.
    """
    for name, values in (("input_mean", mean), ("input_std", std)):
        _check(name, values, channels)
    config = unwrap_model(student).pretrained_cfg
    mean, std = config["mean"] if mean is None else mean, config["std"] if std is None else std
    return _tensor(per_channel(mean, channels)), _tensor(per_channel(std, channels))


def get_teacher_statistics(teacher: DistillationTeacher, channels: int, *, from_config: bool) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (1, C, 1, 1) of the images that a teacher was trained on.

    ``from_config``: read its model's configuration, in full precision; False if the user gave timm's wrapper.
    """
    config = getattr(unwrap_model(teacher.model), "pretrained_cfg", {}) if from_config else {}
    mean = config.get("mean", teacher.mean_kd.flatten().tolist())
    std = config.get("std", teacher.std_kd.flatten().tolist())
    return _tensor(per_channel(mean, channels)), _tensor(per_channel(std, channels))


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel; given another number of values, their mean for all, as in timm's loaders."""
    return tuple(values) if len(values) == channels else (fmean(values),) * channels


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _check(name: str, values: Any, channels: int) -> None:
    if values is None:
        return
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__} {values!r}")
    if len(values) not in {1, channels}:
        raise ValueError(f"{name} must have one value, or one for each of {channels} channels, got {tuple(values)}")
    for value in values:
        _checks.number(name, value, above=0 if name == "input_std" else None)
