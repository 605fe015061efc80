"""Student and method in timm: how a method reads the models, and the model of a method that predicts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import unwrap_model
from torch import Tensor, nn

from disk_plugin._modes import in_mode
from disk_plugin.features.method import BEFORE_LAST_MAP, LAST_MAP, Method, Outputs, Pair
from disk_plugin.taps import TeacherTail, get_tail
from disk_plugin.taps.classifier import check_classifier
from disk_plugin.taps.intermediate import Intermediate
from disk_plugin.taps.timm_models import Layout, TeacherHead


class Reader(NamedTuple):
    """Reads a method's inputs from one of timm's models.

    Attributes:
        reads: ``Method.reads_of``.
        layout: of the last map; None if it is not read.
        head: whether the model's own head is used.
        intermediate: reads the map before the last stage; None if it is not read.
    """

    reads: frozenset[str] = frozenset()
    layout: Layout | None = None
    head: bool = True
    intermediate: Intermediate | None = None

    @classmethod
    def of(cls, model: Any, image: Tensor, reads: frozenset[str]) -> "Reader":
        """Find out how a model shows what a method reads."""
        intermediate = Intermediate.of(model, image) if BEFORE_LAST_MAP in reads else None
        layout = None
        if LAST_MAP in reads:
            layout = Layout.of(model, model.forward_features(image), tuple(image.shape[2:]))
        return cls(reads, layout, intermediate=intermediate)

    def __call__(self, model: Any, input: Tensor) -> Outputs:  # noqa: A002 (timm's name)
        """Run the model's body once; a head with dropout draws separately for logits and features."""
        if not self.reads:
            return Outputs(model(input))
        maps = {}
        if self.intermediate is None:
            features = model.forward_features(input)
        else:
            features, maps[BEFORE_LAST_MAP] = self.intermediate(model, input)
        if self.layout is not None:
            maps[LAST_MAP] = self.layout.to_map(features)
        logits: Any = model.forward_head(features) if self.head else None
        head = model.get_classifier() if "head" in self.reads else None
        return Outputs(
            logits,
            model.forward_head(features, pre_logits=True) if "features" in self.reads else None,
            maps,
            head if callable(head) else None,  # of two heads, a tuple
        )


class Parts(NamedTuple):
    """A method built for a pair, and how it reads both models."""

    method: Method
    student: Reader
    teacher: Layout | None

    def teacher_outputs(self, logits: Tensor, pre_logits: Tensor | None, last_map: Tensor | None) -> Outputs:
        """Return the teacher's outputs as far as the method reads them."""
        maps = {} if last_map is None or self.teacher is None else {LAST_MAP: self.teacher.to_map(last_map)}
        return Outputs(logits, pre_logits if "features" in self.method.reads_of("teacher") else None, maps)


def build_method(
    kind: type[Method] | Method,
    student: Any,
    teacher: Any,
    image: Tensor,
    *,
    teacher_image: Tensor | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Parts:
    """Build a method for a pair, and try it on one image of the training size.

    Args:
        kind: a method class, or a method that is built.
        student: a timm model.
        teacher: a timm model.
        image: (1, C, H, W), normalised for the student.
        teacher_image: the same normalised for the teacher; None for ``image``.
        settings: keywords of the class.

    Raises:
        ValueError: a model that does not return what the method reads; a pair that the method cannot use.
    """
    student, teacher = unwrap_model(student), unwrap_model(teacher)
    student_reads, teacher_reads = kind.reads_of("student"), kind.reads_of("teacher")
    shown_by_all = {"features", "head", LAST_MAP}
    unknown = (student_reads - shown_by_all - {BEFORE_LAST_MAP}) | (teacher_reads - shown_by_all)
    if unknown:
        raise ValueError(
            f"timm's models show 'features', 'head' and the map 'last', as students 'before_last' too, the method "
            f"reads {sorted(unknown)}"
        )
    with in_mode(student, training=False), in_mode(teacher, training=False):
        reader = Reader.of(student, image, student_reads)
        seen = reader(student, image)
        seen_by_teacher = image if teacher_image is None else teacher_image
        with torch.no_grad():
            teachers = Reader.of(teacher, seen_by_teacher, teacher_reads)
            layout, shown = teachers.layout, teachers(teacher, seen_by_teacher)

        def head() -> nn.Module:
            if layout is None:
                raise ValueError("the teacher's head is for methods that read its last map")
            module = TeacherHead(teacher, layout, shown.maps[LAST_MAP])
            with torch.no_grad():
                check_classifier(module, shown.maps[LAST_MAP], shown.logits)
            return module

        def tail(**options: Any) -> TeacherTail:
            return get_tail(teacher, seen_by_teacher, **options)

        pair = Pair(seen, shown, head, tail)
        method = kind if isinstance(kind, Method) else kind.for_pair(pair, **(settings or {}))
        if kind.own_prediction:
            _freeze_unused(student, seen)
            reader = reader._replace(head=False)
    return Parts(method.to(device=image.device, dtype=image.dtype), reader, layout)


class MethodModel(FeatureDistillationTrainableModule):
    """Student and method as one model, for training and inference: the student alone cannot predict.

    The student's own head is unused and frozen. Rebuild the model around fresh ``student`` and ``teacher``
    objects (``build_method``) to load a checkpoint's ``state_dict`` into it.

    Args:
        student: a timm model.
        parts: result of ``build_method``.
        num_classes: number of classes of the prediction.

    Shape:
        input (N, C, H, W); returns logits (N, classes).
    """

    def __init__(self, student: Any, parts: Parts, num_classes: int) -> None:
        super().__init__(student)
        self.read, self.teacher_layout, self.num_classes = parts.student, parts.teacher, num_classes
        self.method_name = type(parts.method).__name__.lower()
        self.add_module(self.method_name, parts.method)

    @property
    def method(self) -> Method:
        """The method; in a checkpoint's keys it has the name of its class."""
        method: Method = getattr(self, self.method_name)
        return method

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (timm's name)
        """Return the logits of inference."""
        return self.method.predict(self.read(self.student, input))


def _freeze_unused(student: nn.Module, seen: Outputs) -> None:
    """Freeze what features and maps do not depend on, as DistributedDataParallel needs every gradient."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    shown = [value for value in (seen.features, *seen.maps.values()) if value is not None]
    size = torch.stack([value.square().sum() for value in shown]).sum()
    for parameter, gradient in zip(parameters, torch.autograd.grad(size, parameters, allow_unused=True), strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
