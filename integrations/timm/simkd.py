"""SimKD in timm: the student's last map, projected, is read by the teacher's own ``forward_head``."""

import copy
import math
from typing import Any, Literal, NamedTuple

import torch
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import unwrap_model
from torch import Tensor, nn

from disk_plugin._modes import in_mode
from disk_plugin.features.simkd import SimKD, SimKDOutput, check_classifier


class Layout(NamedTuple):
    """How a model's ``forward_features`` lays out its last map; ``prefix`` counts class and register tokens."""

    order: Literal["NCHW", "NHWC", "NLC"]
    prefix: int

    @classmethod
    def of(cls, model: nn.Module, features: Tensor) -> "Layout":
        """Read it off a model and what its ``forward_features`` gave."""
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"SimKD needs a last feature map (N, C, H, W), (N, H, W, C) or (N, L, C), got {found}")
        if features.ndim == 3:
            return cls("NLC", getattr(model, "num_prefix_tokens", 0))
        return cls("NHWC" if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else "NCHW", 0)

    def to_map(self, features: Tensor) -> Tensor:
        """Return (N, C, H, W); tokens that stand for no position are left out."""
        if self.order == "NCHW":
            return features
        if self.order == "NHWC":
            return features.permute(0, 3, 1, 2)
        tokens = features[:, self.prefix :]
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(f"SimKD needs the tokens of a square image, got {tokens.shape[1]} of them")
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def from_map(self, feature_map: Tensor) -> Tensor:
        """Return the map as the model's ``forward_head`` reads it; tokens that stand for no position are 0."""
        if self.order == "NCHW":
            return feature_map
        if self.order == "NHWC":
            return feature_map.permute(0, 2, 3, 1)
        tokens = feature_map.flatten(2).transpose(1, 2)
        return torch.cat([tokens.new_zeros(tokens.shape[0], self.prefix, tokens.shape[2]), tokens], 1)


class TeacherHead(nn.Module):
    """A teacher's ``forward_head`` as a module from a map (N, C, H, W) to logits, without the rest of the teacher."""

    def __init__(self, teacher: Any, layout: Layout, teacher_map: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.head: Any = _without_body(copy.deepcopy(teacher).eval(), layout.from_map(teacher_map))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return logits (N, C)."""
        logits: Tensor = self.head.forward_head(self.layout.from_map(feature_map))
        return logits


class SimKDModel(FeatureDistillationTrainableModule):
    """Student, projector and the teacher's head: what SimKD (Chen et al., CVPR 2022) trains and inference runs.

    The student's own head takes no part: it is frozen, and without the projector this student cannot predict. Rebuild
    the model around fresh ``student`` and ``teacher`` objects to load a checkpoint's ``state_dict`` into it; of the
    teacher it keeps the head alone.

    Args:
        student: a timm model with ``forward_features``.
        teacher: a timm model whose ``forward_head`` reads the map: global average pooling, not a class token.
        image: one image (1, C, H, W) of the training size, to try both on.
        teacher_image: the same as the teacher sees it, if it is normalised otherwise.
        factor: the projector's inner width is the teacher's channels // factor.

    Shape:
        input (N, C, H, W); returns logits (N, classes).

    Raises:
        ValueError: a teacher whose head ignores the map or that cannot be separated from it; no map of a known layout.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        image: Tensor,
        *,
        teacher_image: Tensor | None = None,
        factor: int = 2,
    ) -> None:
        super().__init__(student)
        teacher = unwrap_model(teacher)
        with in_mode(student, training=False), in_mode(teacher, training=False):
            student_features = student.forward_features(image)
            self.student_layout = Layout.of(student, student_features)
            student_map = self.student_layout.to_map(student_features)
            with torch.no_grad():
                teacher_image = image if teacher_image is None else teacher_image
                teacher_features = teacher.forward_features(teacher_image)
                teacher_logits = teacher.forward_head(teacher_features)
            self.teacher_layout = Layout.of(teacher, teacher_features)
            teacher_map = self.teacher_layout.to_map(teacher_features)
            _refuse_ignored_map(teacher, self.teacher_layout, teacher_map)
            head = TeacherHead(teacher, self.teacher_layout, teacher_map)
            check_classifier(head, teacher_map, teacher_logits)
            _freeze_unused(student, student_map)
        self.simkd = SimKD(
            student_map.shape[1],
            teacher_map.shape[1],
            head,
            teacher_size=(teacher_map.shape[2], teacher_map.shape[3]),
            factor=factor,
        ).to(device=image.device, dtype=image.dtype)
        self.num_classes = teacher_logits.shape[1]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (timm's name)
        """Return the logits of inference."""
        return self.simkd.predict(self._student_map(input))

    def match(self, input: Tensor, teacher_features: Tensor) -> SimKDOutput:  # noqa: A002 (timm's name)
        """Return the logits and the distance to the teacher's ``forward_features`` output, per sample."""
        return self.simkd(self._student_map(input), self.teacher_layout.to_map(teacher_features))

    def _student_map(self, input: Tensor) -> Tensor:  # noqa: A002 (timm's name)
        return self.student_layout.to_map(self.student.forward_features(input))


def _refuse_ignored_map(teacher: Any, layout: Layout, teacher_map: Tensor) -> None:
    """SimKD trains the student through the teacher's head, so that the head has to look at the map."""
    probe = teacher_map.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = teacher.forward_head(layout.from_map(probe))
    # not the sum of the logits, which a symmetric head may make constant
    gradient = torch.autograd.grad(logits.square().sum(), probe, allow_unused=True)[0] if logits.requires_grad else None
    if gradient is None or not gradient.any():
        pooling = getattr(teacher, "global_pool", None)
        why = "it reads a class token" if pooling == "token" else "or its classifier is zero, as in an untrained model"
        raise ValueError(
            f"SimKD needs a teacher whose head reads the feature map, but that of {type(teacher).__name__} ignores it "
            f"(global_pool={pooling!r}, {why}): the student would get no gradient. Take a teacher with global average "
            f"pooling"
        )


def _without_body(teacher: Any, features: Tensor) -> nn.Module:
    """Drop the children and parameters that ``forward_head`` does not use."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in teacher.modules()]
    teacher.requires_grad_(True)
    with torch.enable_grad():
        logits = teacher.forward_head(features)
    for hook in hooks:
        hook.remove()
    parameters = list(teacher.parameters())
    gradients = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    used = {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    for name, child in list(teacher.named_children()):
        if not called & set(child.modules()) and not used & {id(p) for p in child.parameters()}:
            setattr(teacher, name, nn.Identity())
    for name, parameter in list(teacher.named_parameters(recurse=False)):
        if id(parameter) not in used:
            teacher.register_parameter(name, None)
    return teacher.requires_grad_(False)


def _freeze_unused(student: nn.Module, student_map: Tensor) -> None:
    """Freeze what the map does not depend on, the head: DistributedDataParallel wants every gradient."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(student_map.square().sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
