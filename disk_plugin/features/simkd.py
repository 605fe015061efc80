"""SimKD (Chen et al., CVPR 2022): match the teacher's last feature map, then reuse the teacher's classifier."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from .. import _checks
from .._watch import warn_if_swapped
from ..functional._positions import promote
from ..taps.classifier import check_classifier, pooled_classifier
from .method import LAST_MAP, Method, Outputs, Pair

__all__ = ["SimKD", "SimKDOutput", "check_classifier", "pooled_classifier"]


class SimKDOutput(NamedTuple):
    """Result for a batch.

    Attributes:
        logits: of the reused classifier, (N, C).
        feature_error: mean square difference of the maps per sample, (N,).
    """

    logits: Tensor
    feature_error: Tensor


class SimKD(Method):
    """SimKD's projector and reused classifier (Chen et al., CVPR 2022).

    **This module has parameters**, its projector's: give ``trainable_parameters()`` to an optimizer. The projector
    (1x1, 3x3 and 1x1 convolutions, BatchNorm, ReLU) maps the student's last feature map to the teacher's channels. The
    loss is the mean square of its difference from the teacher's map. The teacher's own classifier reads the projected
    map, at inference too: ``student -> projector -> classifier`` is the model. If the maps differ in size, the larger
    is average-pooled to the smaller, as in the authors' code.

    Args:
        student_channels: channels of the student's last map.
        teacher_channels: channels of the teacher's last map.
        classifier: the teacher's classifier, a module from a map (N, teacher_channels, H, W) to logits (N, C), such as
            ``pooled_classifier(teacher.fc)``. It is copied and frozen, and stays in evaluation mode.
        teacher_size: (H, W) of the teacher's map, to which a larger student map is pooled, at inference too.
        factor: the projector's inner width is ``teacher_channels // factor``.

    Shape:
        student_map (N, student_channels, H, W); teacher_map (N, teacher_channels, *teacher_size).

    Raises:
        ValueError: sizes that are not positive, or ``factor`` above ``teacher_channels``; in ``forward``, maps of
            another shape.
        TypeError: ``classifier`` is not a module.

    Examples:
        >>> import torch
        >>> from disk_plugin.features.simkd import SimKD, pooled_classifier
        >>> simkd = SimKD(32, 64, pooled_classifier(torch.nn.Linear(64, 10)), teacher_size=(8, 8))
        >>> logits, feature_error = simkd(torch.randn(4, 32, 8, 8), torch.randn(4, 64, 8, 8))
        >>> logits.shape, feature_error.shape
        (torch.Size([4, 10]), torch.Size([4]))
    """

    reads = frozenset({LAST_MAP})
    own_prediction = True
    weight_name = "feature_weight"
    shape_settings = ("factor",)

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        classifier: nn.Module,
        *,
        teacher_size: tuple[int, int],
        factor: int = 2,
    ) -> None:
        super().__init__()
        _checks.integer("student_channels", student_channels, at_least=1)
        _checks.integer("teacher_channels", teacher_channels, at_least=1)
        _checks.integer("factor", factor, at_least=1)
        if not isinstance(teacher_size, tuple | list) or len(teacher_size) != 2:
            raise ValueError(f"teacher_size must be (height, width), got {teacher_size!r}")
        for side in teacher_size:
            _checks.integer("teacher_size", side, at_least=1)
        if factor > teacher_channels:
            raise ValueError(f"factor must be at most teacher_channels {teacher_channels}, got {factor}")
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier must be a Module from a map to logits, got {type(classifier).__name__}")
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.teacher_size = (int(teacher_size[0]), int(teacher_size[1]))
        inner = teacher_channels // factor
        widths = ((student_channels, inner, 1), (inner, inner, 3), (inner, teacher_channels, 1))
        layers: list[nn.Module] = []
        for width_in, width_out, kernel in widths:
            layers += [nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=False)]
            layers += [nn.BatchNorm2d(width_out), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers)
        self.classifier = copy.deepcopy(classifier).eval().requires_grad_(False)
        self.warned: set[str] = set()  # kinds of warnings given

    @classmethod
    def for_pair(cls, pair: Pair, **settings: Any) -> "SimKD":
        """Build the method for the pair's last maps and the teacher's head.

        Raises:
            ValueError: a last map of another shape, or a teacher's head that does not read its map alone.
        """
        for side, outputs in (("student", pair.student), ("teacher", pair.teacher)):
            shape = tuple(outputs.maps[LAST_MAP].shape) if LAST_MAP in outputs.maps else "none"
            if len(shape) != 4 or shape == "none":
                raise ValueError(f"SimKD needs a last map (N, C, H, W) of the {side}, got {shape}")
        student_map, teacher_map = pair.student.maps[LAST_MAP], pair.teacher.maps[LAST_MAP]
        size = (teacher_map.shape[2], teacher_map.shape[3])
        channels = student_map.shape[1], teacher_map.shape[1]
        return cls(*channels, pair.teacher_head(), teacher_size=size, **settings)

    def frozen_modules(self) -> list[nn.Module]:
        """Return the teacher's classifier."""
        return [self.classifier]

    def forward(self, student: Outputs | Tensor, teacher: Outputs | Tensor, target: Tensor | None = None) -> Any:
        """Return the losses by name, or, given two maps, what ``match`` returns. The target is not used."""
        if isinstance(student, Tensor) or isinstance(teacher, Tensor):
            return self.match(student, teacher)  # type: ignore[arg-type]
        return {"feature": self.match(student.maps[LAST_MAP], teacher.maps[LAST_MAP]).feature_error}

    def evaluate(self, student: Outputs, teacher: Outputs, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return prediction and losses from one projection."""
        logits, error = self.match(student.maps[LAST_MAP], teacher.maps[LAST_MAP])
        return logits, {"feature": error}

    def match(self, student_map: Tensor, teacher_map: Tensor) -> SimKDOutput:
        """Return the prediction and the distance to the teacher's map, per sample."""
        expected = (student_map.shape[0], self.teacher_channels, *self.teacher_size)
        if tuple(teacher_map.shape) != expected:
            raise ValueError(f"teacher_map must have shape {expected}, got {tuple(teacher_map.shape)}")
        warn_if_swapped(self, student_map, teacher_map, ("student_map", "teacher_map"))
        projected = self.project(student_map)
        height, width = projected.shape[2:]
        # upcast before the difference, which would be rounded; a sum of squares overflows float16
        found, wanted = promote(projected, teacher_map.detach())
        wanted = adaptive_avg_pool2d(wanted, (height, width))
        # a map that is not finite, maybe of an ignored sample, has error NaN but no gradient: 0 times NaN would be NaN
        finite = wanted.flatten(1).isfinite().all(1)
        difference = found - torch.where(finite.view(-1, 1, 1, 1), wanted, found.detach())
        error = torch.where(finite, difference.square().flatten(1).mean(1), torch.nan)
        return SimKDOutput(self.classifier(projected), error)

    def project(self, student_map: Tensor) -> Tensor:
        """Return the student's map with the teacher's channels, at the smaller of both sizes."""
        if student_map.ndim != 4 or student_map.shape[1] != self.student_channels:
            raise ValueError(
                f"student_map must have shape (N, {self.student_channels}, H, W), got {tuple(student_map.shape)}"
            )
        if student_map.shape[2] > self.teacher_size[0]:
            student_map = adaptive_avg_pool2d(student_map, self.teacher_size)
        projected: Tensor = self.projector(student_map)
        return projected

    def predict(self, student: Outputs | Tensor) -> Tensor:
        """Return the logits (N, C) of inference, without a teacher, from outputs or the last map."""
        student_map = student if isinstance(student, Tensor) else student.maps[LAST_MAP]
        logits: Tensor = self.classifier(self.project(student_map))
        return logits

    def about(self) -> dict[str, Any]:
        """Return the size to which a larger student map is pooled."""
        return {"teacher_size": list(self.teacher_size)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> "SimKD":
        """Rebuild the method from its state; the classifier must be one of ``pooled_classifier``."""
        first, last = state["projector.0.weight"], state["projector.6.weight"]
        linear = next(name for name in state if name.startswith("classifier.") and name.endswith(".weight"))
        classes, width = state[linear].shape
        bias = linear.removesuffix("weight") + "bias" in state
        simkd = cls(
            first.shape[1],
            last.shape[0],
            pooled_classifier(nn.Linear(width, classes, bias=bias)),
            teacher_size=tuple(about["teacher_size"]),
            factor=last.shape[0] // first.shape[0],
        )
        simkd.load_state_dict(state)
        return simkd

    def train(self, mode: bool = True) -> "SimKD":
        """Set the projector's mode; the teacher's classifier stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self
