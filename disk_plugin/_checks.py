"""Argument validation in O(1), without reading tensors; messages say what was expected and what came."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def number(
    name: str, value: Any, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> None:
    """Validate a finite real number within the bounds; of a tensor only the shape, as reading it synchronizes."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(
                f"{name} must be a constant, got a tensor that requires grad, but no gradient reaches settings: "
                f"pass {name}.detach() or a number"
            )
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor with one element, got shape {tuple(value.shape)}")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    size = float(value)
    bounds = [
        (above is not None and not size > above, f"> {above}"),
        (at_least is not None and not size >= at_least, f">= {at_least}"),
        (at_most is not None and not size <= at_most, f"<= {at_most}"),
        (not abs(size) < math.inf, "finite"),  # NaN too; torch.compile traces no isfinite of a number that changes
    ]
    for broken, rule in bounds:
        if broken:
            raise ValueError(f"{name} must be {rule}, got {value}")


def integer(name: str, value: Any, *, at_least: int | None = None) -> None:
    """Validate an integer (Python's or numpy's) of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")


def choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise ValueError, listing the known modes, if ``value`` is not one of them."""
    if value not in known:
        raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")


def tensor(name: str, value: Any) -> None:
    """Raise TypeError if ``value`` is not a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {value.dtype}")


def logits(student_logits: Any, teacher_logits: Any, student: str = "student_logits") -> None:
    """Validate logits of the same shape, (N, C) or (N, C, d1, ...), C >= 2; ``student`` names the first in messages."""
    tensor(student, student_logits)
    tensor("teacher_logits", teacher_logits)
    shape = tuple(student_logits.shape)
    if tuple(teacher_logits.shape) != shape:
        raise ValueError(f"teacher_logits must have the shape of {student} {shape}, got {tuple(teacher_logits.shape)}")
    if len(shape) < 2:
        raise ValueError(f"{student} must have shape (N, C) or (N, C, d1, ...), got {shape}")
    if shape[1] < 2:
        raise ValueError(f"{student} must have at least 2 classes along dimension 1, got shape {shape}")


def label(value: Any, student_logits: Tensor) -> None:
    """Validate class indices: int64, (N,) or (N, d1, ...)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"label must be a Tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"label must be int64 class indices, got {value.dtype}")
    if tuple(value.shape) != positions(student_logits):
        raise ValueError(f"label must have shape {positions(student_logits)}, got {tuple(value.shape)}")


def per_position(name: str, value: Any, student_logits: Tensor) -> None:
    """Validate one value per target: the logits' shape without the class dimension."""
    tensor(name, value)
    expected = positions(student_logits)
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")


def positions(student_logits: Tensor) -> tuple[int, ...]:
    """Return the logits' shape without the class dimension: (N,) or (N, d1, ...)."""
    return (student_logits.shape[0], *student_logits.shape[2:])


def label_smoothing(value: Any) -> None:
    """Validate a number in [0, 1); a tensor raises, as whether it is 0 decides what is evaluated."""
    if isinstance(value, Tensor):
        raise TypeError("label_smoothing must be a number, got Tensor")
    number("label_smoothing", value)
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing must be >= 0 and < 1, got {value}")


def class_weight(value: Any, classes: int | None = None) -> None:
    """Validate None or one weight per class, (C,); C is ``classes`` if that is known."""
    if value is None:
        return
    tensor("weight", value)
    shape = tuple(value.shape)
    if len(shape) != 1 or classes not in (None, shape[0]):
        expected = "(C,)" if classes is None else f"(C,) = ({classes},)"
        raise ValueError(f"weight must have shape {expected}, got {shape}")


def target(value: Any, student_logits: Tensor) -> None:
    """Validate class indices, int64 (N, d1, ...), or probabilities, floating-point of the logits' shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(value).__name__}")
    indices, probabilities = positions(student_logits), tuple(student_logits.shape)
    expected = f"int64 class indices of shape {indices} or floating-point probabilities of shape {probabilities}"
    came = f"{value.dtype} of shape {tuple(value.shape)}"
    if value.dtype != torch.int64 and not value.is_floating_point():
        raise TypeError(f"target must be {expected}, got {came}")
    if value.is_floating_point() and tuple(value.shape) == indices:
        raise TypeError(f"target must be {expected}, got {came}: call target.long() if these are class indices")
    if tuple(value.shape) != (probabilities if value.is_floating_point() else indices):
        raise ValueError(f"target must be {expected}, got {came}")


def sample_weight(value: Any, student_logits: Tensor) -> None:
    """Validate one weight per sample, (N,), or per target, (N, d1, ...)."""
    tensor("sample_weight", value)
    expected = positions(student_logits)
    if tuple(value.shape) not in {expected, expected[:1]}:
        raise ValueError(f"sample_weight must have shape {expected[:1]} or {expected}, got {tuple(value.shape)}")
