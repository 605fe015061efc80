"""Accuracy and agreement of two classifiers on the same batches."""

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from .._batches import first_two
from .._modes import in_mode
from ..taps import logits_of


class Counts(NamedTuple):
    """Numbers of non-ignored targets, of correct predictions and of those that agree."""

    samples: int
    student_right: int
    teacher_right: int
    agree: int
    num_classes: int


@torch.no_grad()
def compare(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    name: str,
    *,
    device: torch.device | str | None,
    max_batches: int | None,
    ignore_index: int,
) -> Counts:
    """Count over a loader, with both models in evaluation mode; ``name`` is the loader's in messages."""
    sums = torch.zeros(4, dtype=torch.int64)
    classes = 0
    with ExitStack() as stack:
        for model in (student, teacher):
            stack.enter_context(in_mode(model, training=False))
        for x, target in islice(first_two(loader, name), max_batches):
            logits = {}
            for role, model in {"student": student, "teacher": teacher}.items():
                where = _get_device(model) if device is None else device
                logits[role] = logits_of(model(_to(x, where))).cpu()
            _check(logits["student"], logits["teacher"], target, name)
            classes = logits["student"].shape[1]
            sums += _count(logits, target.cpu().long(), name, ignore_index)
    if not sums[0]:
        raise ValueError(f"{name} must yield at least one sample that is not ignored, got none")
    samples, student_right, teacher_right, agree = (int(value) for value in sums)
    return Counts(samples, student_right, teacher_right, agree, classes)


def _count(logits: dict[str, Tensor], target: Tensor, name: str, ignore_index: int) -> Tensor:
    """Return one batch's counts: non-ignored targets, correct ones of student and teacher, and those that agree."""
    valid = target != ignore_index
    classes = logits["student"].shape[1]
    outside = valid & ((target < 0) | (target >= classes))
    if outside.any():
        raise ValueError(
            f"target must lie in [0, {classes}), the number of the models' classes, or be ignore_index="
            f"{ignore_index}, got {int(target[outside][0])} from {name}"
        )
    predicted = {}
    for role, values in logits.items():
        broken = (values.isnan().any(1) & valid).sum()
        if broken:
            raise ValueError(f"{role} must give logits without NaN, got NaN at {int(broken)} samples of {name}'s batch")
        predicted[role] = values.argmax(1)
    agree = predicted["student"] == predicted["teacher"]
    found = (valid, *((predicted[role] == target) & valid for role in ("student", "teacher")), agree & valid)
    return torch.stack([each.sum() for each in found])


def _check(student_logits: Tensor, teacher_logits: Tensor, target: Any, name: str) -> None:
    _checks.tensor("student's logits", student_logits)
    _checks.tensor("teacher's logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher must give logits of the student's shape {tuple(student_logits.shape)}, got "
            f"{tuple(teacher_logits.shape)}"
        )
    _checks.logits(student_logits, teacher_logits, student="student's logits")
    expected = f"class indices of shape {_checks.positions(student_logits)}"
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must yield (x, target), target a Tensor of {expected}, got {type(target).__name__}")
    came = f"{target.dtype} of shape {tuple(target.shape)}"
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(
            f"target of {name} must be {expected}, got {came}: accuracy needs the labels as they were before mixup or "
            f"label smoothing (one-hot ones: target.argmax(1))"
        )
    if tuple(target.shape) != _checks.positions(student_logits):
        one_hot = " (one-hot ones: target.argmax(1))" if target.shape == student_logits.shape else ""
        raise ValueError(f"target of {name} must be {expected}, got {came}{one_hot}")


def _to(x: Any, device: Any) -> Any:
    return x.to(device) if hasattr(x, "to") else x


def _get_device(model: nn.Module) -> torch.device:
    return next((value.device for value in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
