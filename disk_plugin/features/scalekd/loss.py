"""ScaleKD's losses of features: two stages of the student, in two views, one of them through the teacher's tail."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from ... import _checks
from ...taps.tails import TeacherTail
from .projector import CrossAttentionProjector, check_heads
from .views import view_distance

_SUFFIXES = {"original": "", "dc_removed": "_no_dc"}  # of the losses' names


class ScaleKDLoss(nn.Module):
    r"""ScaleKD's losses of features per sample (Fan et al., NeurIPS 2024), as in the authors' code.

    For each view, the original one and the one without the maps' mean over space:

    - **proxy**: the student's stage 3, projected to the entry of the teacher's last stage, passes through that stage.
      The result Q is compared with the teacher's final map T.
    - **main**: the student's stage 4, projected with Q as the queries of the attention, is compared with T too. Q is
      not detached, so this trains stage 3 as well.

    **This module has parameters**, four projectors' (two if a view's weight is 0): give ``trainable_parameters()`` to
    an optimizer. They are dropped after training. For Swin-L and ResNet-50 they are 176 million.

    Args:
        stage3_shape: (C, H, W) of the student's map one stage before its last.
        stage4_shape: (C, H, W) of the student's last map.
        tail: the teacher's last stage, see ``taps.tails.get_tail``.
        original_weight: weight of the original view, per location, >= 0; the authors' 0.08 for 7 x 7 is 3.92.
        dc_removed_weight: weight of the view without the mean, >= 0; the authors' 0.06 for 7 x 7 is 2.94.
        proxy_weight: factor of both proxy losses, >= 0.
        proxy_heads: attention heads of the projectors of stage 3.
        main_heads: attention heads of the projectors of stage 4.
        attention_scale: sharpness of the attention, see ``CrossAttentionProjector``.
        norm: of the student's maps, ``"batch"`` or ``"layer"``.

    Shape:
        maps (N, C, H, W). Returns the losses ``proxy``, ``main``, ``proxy_no_dc`` and ``main_no_dc``, (N,), float32 at
        least, multiplied by their weights.

    Raises:
        ValueError: values out of range, no weight above 0, or a map of 1 x 1 with ``dc_removed_weight`` > 0; in
            ``forward``, maps of another shape.
        TypeError: ``tail`` is no ``TeacherTail``.
        RuntimeError: in ``forward``, the teacher is in training mode or not frozen any more.

    Examples:
        >>> import torch
        >>> tail = TeacherTail(torch.nn.Conv2d(16, 32, 2, stride=2).eval(), (16, 8, 8), (32, 4, 4))
        >>> scalekd = ScaleKDLoss((12, 8, 8), (24, 4, 4), tail)
        >>> losses = scalekd(torch.randn(2, 12, 8, 8), torch.randn(2, 24, 4, 4), torch.randn(2, 32, 4, 4))
        >>> {name: tuple(loss.shape) for name, loss in losses.items()}
        {'proxy': (2,), 'main': (2,), 'proxy_no_dc': (2,), 'main_no_dc': (2,)}
    """

    def __init__(
        self,
        stage3_shape: tuple[int, int, int],
        stage4_shape: tuple[int, int, int],
        tail: TeacherTail,
        *,
        original_weight: float = 4.0,
        dc_removed_weight: float = 3.0,
        proxy_weight: float = 1.0,
        proxy_heads: int = 8,
        main_heads: int = 8,
        attention_scale: float = 5.0,
        norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        super().__init__()
        if not isinstance(tail, TeacherTail):
            raise TypeError(
                f"tail must be a TeacherTail, such as of get_tail(teacher, images), got {type(tail).__name__}"
            )
        for name, shape in {"stage3_shape": stage3_shape, "stage4_shape": stage4_shape}.items():
            if not isinstance(shape, tuple | list) or len(shape) != 3:
                raise ValueError(f"{name} must be (channels, height, width), got {shape!r}")
        weights = {"original": original_weight, "dc_removed": dc_removed_weight}
        for name, value in weights.items():
            _checks.number(f"{name}_weight", value, at_least=0)
        _checks.number("proxy_weight", proxy_weight, at_least=0)
        check_heads("proxy_heads", proxy_heads, tail.entry_width)
        check_heads("main_heads", main_heads, tail.final_width)
        self.weights = {view: float(value) for view, value in weights.items() if value > 0}
        if not self.weights:
            raise ValueError("original_weight or dc_removed_weight must be > 0, got 0 and 0")
        if "dc_removed" in self.weights:
            given = {"map before its last stage": stage3_shape, "last map": stage4_shape}
            sizes = {f"the student's {name}": shape[1:] for name, shape in given.items()}
            _check_sizes({"the teacher's final map": tail.final_size, **sizes})
        self.tail, self.proxy_weight = tail, float(proxy_weight)
        options: dict[str, Any] = {"attention_scale": attention_scale, "norm": norm}
        self.proxy, self.main = nn.ModuleDict(), nn.ModuleDict()  # projectors by view
        for view in self.weights:
            self.proxy[view] = CrossAttentionProjector(
                stage3_shape[0], tail.entry_width, stage3_shape[1:], tail.entry_size, heads=proxy_heads, **options
            )
            self.main[view] = CrossAttentionProjector(
                stage4_shape[0], tail.final_width, stage4_shape[1:], heads=main_heads, **options
            )

    def forward(self, stage3: Tensor, stage4: Tensor, teacher_map: Tensor) -> dict[str, Tensor]:
        """Return the losses per sample by name."""
        if teacher_map.ndim != 4 or teacher_map.shape[1] != self.tail.final_width:
            expected = f"(N, {self.tail.final_width}, H, W)"
            raise ValueError(f"teacher_map must have shape {expected}, got {tuple(teacher_map.shape)}")
        for name, student_map in {"stage3": stage3, "stage4": stage4}.items():
            if student_map.shape[0] != teacher_map.shape[0]:
                raise ValueError(
                    f"{name} must have the batch size of teacher_map {teacher_map.shape[0]}, got {student_map.shape[0]}"
                )
        if "dc_removed" in self.weights:
            _check_sizes({"stage3": stage3.shape[2:], "stage4": stage4.shape[2:], "teacher_map": teacher_map.shape[2:]})
        losses = {}
        for view, weight in self.weights.items():
            suffix, dc = _SUFFIXES[view], view == "original"
            proxy = self.project_proxy(stage3, view, teacher_map)
            main = self.project_main(stage4, view, proxy)
            losses[f"proxy{suffix}"] = self.proxy_weight * weight * view_distance(proxy, teacher_map, dc=dc)
            losses[f"main{suffix}"] = weight * view_distance(main, teacher_map, dc=dc)
        return losses

    def project_proxy(self, stage3: Tensor, view: str, teacher_map: Tensor) -> Tensor:
        """Return the student's stage 3 after the teacher's tail, a map of the shape of ``teacher_map``."""
        size = self.tail.entry_size_for((teacher_map.shape[2], teacher_map.shape[3]))
        final: Tensor = self.tail(self.proxy[view](stage3, size=size), size)
        return final

    def project_main(self, stage4: Tensor, view: str, queries: Tensor) -> Tensor:
        """Return the student's stage 4 at the locations of a map of queries, a map of the same shape."""
        tokens = self.main[view](stage4, queries.flatten(2).transpose(1, 2))
        return self.tail.finish(tokens.transpose(1, 2).reshape(queries.shape))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the projectors' parameters; the tail is frozen."""
        return [*self.proxy.parameters(), *self.main.parameters()]

    def extra_repr(self) -> str:
        """Show the weights and the number of trainable parameters."""
        count = sum(parameter.numel() for parameter in self.trainable_parameters())
        return f"weights={self.weights}, proxy_weight={self.proxy_weight}, trainable_parameters={count:_}"


def _check_sizes(sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError if a map has one location: all of the teacher's would read the same of it."""
    for name, size in sizes.items():
        if tuple(size) == (1, 1):
            raise ValueError(
                f"{name} has size 1 x 1, so that nothing is left without its mean: set dc_removed_weight=0, or give "
                f"larger images"
            )
