"""The hyper-parameters of eq. (5) as one record, validated once."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import _checks
from ..variants import Variant

_NUMBERS = (
    "ce_weight",
    "distill_weight",
    "temperature",
    "student_temperature",
    "multiplier",
    "budget",
    "guide_gradient_scale",
    "label_smoothing",
)


class Settings(NamedTuple):
    """The hyper-parameters of ``disk_terms`` and ``DiSKLoss``; see there."""

    ce_weight: float
    distill_weight: float
    temperature: float
    student_temperature: float | Tensor
    top_k: int | None
    multiplier: float | Tensor
    budget: float | Tensor
    variant: Variant
    guide_gradient_scale: float | None
    hold_discount: bool
    ignore_index: int
    weight: Tensor | None
    label_smoothing: float
    reduce_mean: Callable[[Tensor], Tensor] | None = None

    def checked(self) -> "Settings":
        """Return the validated record, with Python floats in place of numpy's.

        Raises:
            ValueError: values out of range.
            TypeError: values that are not numbers.
        """
        _checks.number("ce_weight", self.ce_weight, at_least=0)
        _checks.number("distill_weight", self.distill_weight, at_least=0)
        _checks.number("temperature", self.temperature, above=0)
        _checks.number("student_temperature", self.student_temperature, above=0)
        if self.top_k is not None:
            _checks.integer("top_k", self.top_k, at_least=1)
        _checks.number("multiplier", self.multiplier, at_least=0)
        _checks.number("budget", self.budget, at_least=0)
        if self.guide_gradient_scale is not None:
            _checks.number("guide_gradient_scale", self.guide_gradient_scale, above=0)
        _checks.integer("ignore_index", self.ignore_index)
        _checks.class_weight(self.weight)
        _checks.label_smoothing(self.label_smoothing)
        values: dict[str, Any] = {name: getattr(self, name) for name in Settings._fields}
        numbers = {name: _as_float(values[name]) for name in _NUMBERS}
        # dynamo of torch 2.4 traces neither _replace nor a union of dicts
        return Settings(**{**values, **numbers, "ignore_index": int(self.ignore_index)})

    def scaffolded(self, classes: int) -> int:
        """Return K, the number of the teacher's classes that receive g, out of ``classes``."""
        return min(self.top_k or classes, classes)


def _as_float(value: Any) -> Any:
    """Return a number as a Python float, as narrow numpy types would round products."""
    return value if value is None or isinstance(value, Tensor) else float(value)
