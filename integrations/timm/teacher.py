"""The teacher: whether it fits the student, and its outputs for guide and method."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.task import DistillationTeacher
from timm.utils import unwrap_model
from torch import Tensor, nn

from .normalisation import get_teacher_statistics

_RELATIVE_TOLERANCE = 1e-2  # a wrong head differs by the size of the logits, half precision by less

TeacherOutputs = tuple[Tensor, Tensor | None, Tensor | None]  # logits (N, C), pre-logits (N, D), last map


def check_classes(teacher: nn.Module, student: nn.Module, *, by_name: bool) -> None:
    """Validate that the teacher has the student's classes.

    ``by_name``: timm built it from a name, with the student's number of classes; if the pretrained weights have another
    one, timm leaves the new head random without a warning.

    Raises:
        ValueError: another number of classes.
    """
    teacher, student = unwrap_model(teacher), unwrap_model(student)
    expected = student.num_classes
    pretrained = getattr(teacher, "pretrained_cfg", {}).get("num_classes") if by_name else None
    if pretrained not in (None, expected):
        raise ValueError(
            f"the teacher's weights are for {pretrained} classes, the student has {expected}: its new head would be "
            f"random. Give a teacher trained on these classes (--disk-teacher-checkpoint FILE or local-dir:DIR)"
        )
    found = getattr(teacher, "num_classes", expected)
    if found != expected:
        raise ValueError(f"the teacher must have the student's {expected} classes, got {found}")


def image_size(student: Any, given: Sequence[int] | None) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images: as given, else as the student was built for.

    Raises:
        ValueError: another number of channels than the student reads.
    """
    student = unwrap_model(student)
    fixed = getattr(getattr(student, "patch_embed", None), "img_size", None)
    channels, *size = student.pretrained_cfg["input_size"]
    expected = getattr(student, "in_chans", channels)
    channels, height, width = given or (expected, *(fixed or size))
    if channels != expected:
        raise ValueError(
            f"the images must have the student's {expected} channels, got {channels}: give "
            f"input_size=({expected}, {height}, {width}) (--input-size {expected} {height} {width})"
        )
    return channels, height, width


def teacher_outputs(model: Any, input: Tensor, *, features: bool) -> TeacherOutputs:  # noqa: A002 (timm's name)
    """Run the teacher once: logits and, with ``features``, pre-logits and the last feature map."""
    if not features:
        return model(input), None, None
    feature_map = model.forward_features(input)
    return model.forward_head(feature_map), model.forward_head(feature_map, pre_logits=True), feature_map


class FrozenTeacher(DistillationTeacher):
    """timm's teacher, frozen, which reads images normalised as in its own training.

    Args:
        teacher: timm's wrapper, which is not changed.
        channels: number of channels of the images.
        from_config: whether mean and std are those of its model's configuration, or of timm's wrapper.
    """

    mean_kd: Tensor
    std_kd: Tensor

    def __init__(self, teacher: DistillationTeacher, channels: int, *, from_config: bool) -> None:
        super().__init__(teacher.model, device=teacher.mean_kd.device)
        mean, std = get_teacher_statistics(teacher, channels, from_config=from_config)
        self.mean_kd, self.std_kd = mean.to(self.mean_kd), std.to(self.std_kd)
        self.requires_grad_(False)
        self._outputs = teacher_outputs

    def normalize_input(
        self,
        input: Tensor,  # noqa: A002 (timm's name)
        student_mean: Tensor | None = None,
        student_std: Tensor | None = None,
    ) -> Tensor:
        """Return the student's images normalised for the teacher; computed in float32, in the input's dtype."""
        return super().normalize_input(input, student_mean, student_std).detach().to(input.dtype)

    def outputs(self, image: Tensor, *, features: bool) -> TeacherOutputs:
        """Run the teacher once on images normalised for it; logits and pre-logits are float32 at least."""
        logits, pre_logits, last_map = self._outputs(self.model, image, features=features)
        return _single(logits), None if pre_logits is None else _single(pre_logits), last_map

    def compile(self, **options: Any) -> "FrozenTeacher":
        """Compile the function that ``outputs`` runs."""
        self._outputs = torch.compile(teacher_outputs, **options)
        return self


def _single(values: Tensor) -> Tensor:
    """Upcast half precision, as the user's own guide may not accept it."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@torch.no_grad()
def probe(teacher: FrozenTeacher, image: Tensor, num_classes: int, *, features: bool) -> TeacherOutputs:
    """Try the teacher on an image of the student's size, normalised for it.

    Raises:
        ValueError: it takes images of another size, has other classes, or has no separate head.
    """
    model = teacher.model
    if features and not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise ValueError(
            f"the guide reads the teacher's pre-logits, but {type(model).__name__} has no forward_features and "
            f"forward_head: give a timm model, or guide={{'use_features': False}} (--no-disk-guide-use-features)"
        )
    try:
        outputs = teacher.outputs(image, features=features)
        plain = model(image)
    except (AssertionError, RuntimeError) as error:
        wanted = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = f"teacher and student see the same images, of size {tuple(image.shape[1:])}, but the teacher "
        if wanted is None or tuple(wanted) == tuple(image.shape[2:]):
            raise ValueError(f"{size}cannot read them: {error}") from error
        raise ValueError(f"{size}expects {tuple(wanted)}: {error}") from error
    for logits in (plain, outputs[0]):
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, num_classes):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the teacher's logits must have shape (N, {num_classes}), got {shape}")
    if outputs[1] is not None and outputs[1].ndim != 2:
        raise ValueError(f"the teacher's pre-logits must have shape (N, D), got {tuple(outputs[1].shape)}")
    if not (outputs[0] - plain).norm() <= _RELATIVE_TOLERANCE * plain.norm():
        raise ValueError("the teacher's forward_head(forward_features(x)) does not reproduce its logits")
    return outputs
