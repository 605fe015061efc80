"""ScaleKD (Fan et al., NeurIPS 2024) as a method: its losses of features and of logits, per sample."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import _checks
from ...taps.tails import TeacherTail
from ..method import BEFORE_LAST_MAP, LAST_MAP, Method, Outputs, Pair
from .logits import logit_losses
from .loss import ScaleKDLoss

_FEATURE_LOSSES = {"both": (), "dc_removed": ("proxy", "main")}  # those that the guide leaves alone
_LOGIT_LOSSES = frozenset({"ce", "kd"})


class ScaleKD(Method):
    r"""ScaleKD: the student's last two stages in a large teacher's terms, one of them through the teacher's last stage.

    The losses of features are ``ScaleKDLoss``'s: a projector by cross-attention for each stage and view, the frozen
    teacher's last stage behind that of the first, and the distance of both to the teacher's final map, once as it is
    and once without its mean over space. Beside them are the task's cross-entropy and one with the teacher's
    probabilities, whose place is DiSK's own where a guide weighs the method. At inference nothing remains but the
    student.

    **This module has parameters**, the projectors: give ``trainable_parameters()`` to an optimizer. They are many, 176
    million from ResNet-50 to Swin-L, and are dropped after training.

    Args:
        before_last_shape: (C, H, W) of the student's map before its last stage.
        last_shape: (C, H, W) of the student's last map.
        tail: the teacher's last stage, see ``taps.get_tail``.
        ce_weight: weight of the cross-entropy of the labels, >= 0; the authors' is 1 - kd_weight.
        kd_weight: weight of the cross-entropy with the teacher's probabilities, >= 0.
        temperature: divides both logits of the latter, > 0.
        original_weight: weight of the maps as they are, per location, >= 0; the authors' 0.08 for 7 x 7 is 3.92.
        dc_removed_weight: weight of the maps without their mean, per location, >= 0; the authors' 0.06 for 7 x 7 is
            2.94.
        proxy_weight: factor of the losses behind the teacher's last stage, >= 0.
        proxy_heads: attention heads of the projector to the teacher's last stage; a divisor of its width.
        main_heads: attention heads of the projector to the teacher's final map; a divisor of its width.
        attention_scale: sharpness of the attention, > 0, beside its usual 1/sqrt(d).
        norm: of the student's maps: "batch", or "layer", with which a sample has no influence on others.
        weighted_views: which losses of features a guide weighs: "both", or "dc_removed" for those of the maps without
            their mean alone.
        tail_blocks: number of blocks in the tail of a teacher without stages, such as a ViT.
        tail_final_blocks: number of blocks behind these, through which the projection of the last map passes too.
        checkpoint_tail: recompute the tail's activations in the backward pass instead of storing them.

    Shape:
        logits (N, C), maps (N, D, H, W); target class indices (N,) or probabilities (N, C). Returns the losses ``ce``,
        ``kd``, ``proxy``, ``main``, ``proxy_no_dc`` and ``main_no_dc``, (N,), weighted, 0 for class indices outside 0
        to C - 1.

    Raises:
        ValueError: values out of range; heads that do not divide a width; a map of 1 x 1, of which nothing is left
            without its mean; maps of other shapes, or none.
        TypeError: values of another type.
        RuntimeError: in ``forward``, the teacher is in training mode or not frozen any more, or its tail is under
            ``torch.no_grad()``.

    Examples:
        >>> tail = TeacherTail(torch.nn.Conv2d(16, 32, 2, stride=2).eval(), (16, 8, 8), (32, 4, 4))
        >>> scalekd = ScaleKD((12, 8, 8), (24, 4, 4), tail)
        >>> maps = {"before_last": torch.randn(2, 12, 8, 8), "last": torch.randn(2, 24, 4, 4)}
        >>> teacher = Outputs(torch.randn(2, 10), maps={"last": torch.randn(2, 32, 4, 4)})
        >>> sorted(scalekd(Outputs(torch.randn(2, 10), maps=maps), teacher, torch.arange(2)))
        ['ce', 'kd', 'main', 'main_no_dc', 'proxy', 'proxy_no_dc']
    """

    reads = frozenset({LAST_MAP})
    student_reads = frozenset({BEFORE_LAST_MAP})
    unguided = _LOGIT_LOSSES
    scaffolded = _LOGIT_LOSSES
    shape_settings = ("dc_removed_weight", "norm", "original_weight")

    def __init__(
        self,
        before_last_shape: tuple[int, int, int],
        last_shape: tuple[int, int, int],
        tail: TeacherTail,
        *,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        original_weight: float = 4.0,
        dc_removed_weight: float = 3.0,
        proxy_weight: float = 1.0,
        proxy_heads: int = 8,
        main_heads: int = 8,
        attention_scale: float = 5.0,
        norm: Literal["batch", "layer"] = "batch",
        weighted_views: str = "both",
        tail_blocks: int = 2,
        tail_final_blocks: int = 0,
        checkpoint_tail: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"ce_weight": ce_weight, "kd_weight": kd_weight}.items():
            _checks.number(name, value, at_least=0)
        _checks.number("temperature", temperature, above=0)
        _checks.choice("weighted_views", weighted_views, tuple(_FEATURE_LOSSES))
        self.logit_weights = {"ce_weight": ce_weight, "kd_weight": kd_weight, "temperature": temperature}
        self.unguided = _LOGIT_LOSSES | set(_FEATURE_LOSSES[weighted_views])
        self.features = ScaleKDLoss(
            before_last_shape,
            last_shape,
            tail,
            original_weight=original_weight,
            dc_removed_weight=dc_removed_weight,
            proxy_weight=proxy_weight,
            proxy_heads=proxy_heads,
            main_heads=main_heads,
            attention_scale=attention_scale,
            norm=norm,
        )

    @classmethod
    def for_pair(cls, pair: Pair, **settings: Any) -> "ScaleKD":
        """Build the method for the pair's maps and the teacher's tail.

        Raises:
            ValueError: maps of another shape, or swapped; a teacher without a tail that works, the message lists those
                that do; a teacher whose final map is not its tail's.
        """
        before, last = (_shape(pair.student, "student", name) for name in (BEFORE_LAST_MAP, LAST_MAP))
        if before[1] * before[2] < last[1] * last[2]:
            raise ValueError(
                f"the student's map before its last stage must not be smaller than its last one, got {before[1:]} and "
                f"{last[1:]}: are the names of its modules swapped?"
            )
        final = _shape(pair.teacher, "teacher", LAST_MAP)
        how = {"blocks": "tail_blocks", "final_blocks": "tail_final_blocks", "checkpoint": "checkpoint_tail"}
        tail = pair.teacher_tail(**{name: settings[key] for name, key in how.items() if key in settings})
        if (tail.final_width, *tail.final_size) != final:
            raise ValueError(
                f"the teacher's last map must be what its last stage makes, (C, H, W) = "
                f"{(tail.final_width, *tail.final_size)}, got {final}"
            )
        return cls(before, last, tail, **settings)

    def frozen_modules(self) -> list[nn.Module]:
        """Return the teacher's last stage."""
        return [self.features.tail]

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Return the losses per sample, multiplied by their weights."""
        if student.logits.ndim != 2:
            raise ValueError(f"ScaleKD needs logits (N, C), one per image, got shape {tuple(student.logits.shape)}")
        losses = logit_losses(student.logits, teacher.logits, target, **self.logit_weights)
        before, last = (_given(student, "student", name) for name in (BEFORE_LAST_MAP, LAST_MAP))
        losses |= self.features(before, last, _given(teacher, "teacher", LAST_MAP))
        if target.is_floating_point():
            return losses
        counts = (target >= 0) & (target < student.logits.shape[1])
        return {name: torch.where(counts, loss, 0.0) for name, loss in losses.items()}

    def extra_repr(self) -> str:
        """Show the settings of the losses on logits."""
        return ", ".join(f"{name}={value}" for name, value in self.logit_weights.items())


def _given(outputs: Outputs, side: str, name: str) -> Tensor:
    if name not in outputs.maps:
        raise ValueError(f"ScaleKD needs the map {name!r} of the {side} in Outputs.maps, got {sorted(outputs.maps)}")
    return outputs.maps[name]


def _shape(outputs: Outputs, side: str, name: str) -> tuple[int, int, int]:
    found = _given(outputs, side, name)
    if found.ndim != 4:
        raise ValueError(f"ScaleKD needs a map {name!r} (N, C, H, W) of the {side}, got {tuple(found.shape)}")
    return found.shape[1], found.shape[2], found.shape[3]
