"""The teacher: where its weights come from, whether it fits, and what the guide reads of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from timm.models import create_model
from timm.models import load_state_dict as read_state_dict
from timm.utils import unwrap_model
from torch import Tensor, nn

_RELATIVE_TOLERANCE = 1e-2  # a wrong head is off by its whole size; half precision is not

TeacherOutputs = tuple[Tensor, Tensor | None, Tensor | None]  # logits (N, C), pre-logits (N, D), last map


def load_teacher(name: str, checkpoint: str, student: nn.Module, **factory: Any) -> nn.Module:
    """Build a teacher by name, with the student's classes and channels, and the weights of a file; no network.

    Raises:
        ValueError: no checkpoint, or one for another number of classes or another model.
        OSError: no such file.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"expected the teacher's weights, found no file {checkpoint}")
    student = unwrap_model(student)
    try:
        weights = read_state_dict(checkpoint)
    except (RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"expected the teacher's weights, got {checkpoint}, which cannot be loaded: {error}"
        ) from error
    teacher = create_model(
        name, pretrained=False, num_classes=student.num_classes, in_chans=student.in_chans, **factory
    )
    found = _classes_of(weights, teacher.pretrained_cfg.get("classifier"))
    if found not in (None, student.num_classes):
        raise ValueError(f"the teacher in {checkpoint} has {found} classes, the student {student.num_classes}")
    try:
        teacher.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights in {checkpoint} do not fit the teacher {name}: {error}") from error
    return teacher


def _classes_of(weights: Mapping[str, Tensor], classifier: Any) -> int | None:
    """Rows of the first classifier that the configuration names, if the file holds it."""
    first = classifier[0] if isinstance(classifier, tuple | list) else classifier
    weight = weights.get(f"{first}.weight")
    return None if weight is None else weight.shape[0]


def check_classes(teacher: nn.Module, student: nn.Module, *, by_name: bool) -> None:
    """Refuse a teacher that does not tell the student's classes apart.

    ``by_name``: timm built it from a name, with the student's number of classes; where the pretrained weights have
    another one, timm leaves the new head at random values and says nothing.

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


def input_size_of(student: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images the student was built for."""
    student = unwrap_model(student)
    fixed = getattr(getattr(student, "patch_embed", None), "img_size", None)
    channels, *size = student.pretrained_cfg["input_size"]
    return getattr(student, "in_chans", channels), *(fixed or size)


def teacher_outputs(model: nn.Module, input: Tensor, *, features: bool) -> TeacherOutputs:  # noqa: A002 (timm's name)
    """Run the teacher once: logits and, with ``features``, pre-logits and the last feature map."""
    if not features:
        return model(input), None, None
    feature_map = model.forward_features(input)
    return model.forward_head(feature_map), model.forward_head(feature_map, pre_logits=True), feature_map


@torch.no_grad()
def probe(
    teacher: nn.Module, normalize: Callable[[Tensor], Tensor], image: Tensor, num_classes: int, *, features: bool
) -> TeacherOutputs:
    """Try the teacher on an image of the student's size.

    Raises:
        ValueError: it takes images of another size, gives other classes, or has no head that can be told apart.
    """
    if features and not (hasattr(teacher, "forward_features") and hasattr(teacher, "forward_head")):
        raise ValueError(
            f"the guide reads the teacher's pre-logits, but {type(teacher).__name__} has no forward_features and "
            f"forward_head: give a timm model, or guide={{'use_features': False}} (--no-disk-guide-use-features)"
        )
    try:
        outputs = teacher_outputs(teacher, normalize(image), features=features)
        plain = teacher(normalize(image))
    except (AssertionError, RuntimeError) as error:
        wanted = getattr(getattr(teacher, "patch_embed", None), "img_size", None)
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
