"""SimKD under its former names, from before ``DiSKTask(method=...)``."""

from typing import Any, cast

from timm.utils import unwrap_model
from torch import Tensor

from disk_plugin.features import METHODS
from disk_plugin.features.guided import FeatureWeight
from disk_plugin.features.method import LAST_MAP
from disk_plugin.features.simkd import SimKD, SimKDOutput
from disk_plugin.taps import Layout

from .model import MethodModel, Parts, build_method
from .task import DiSKTask

_SIMKD = METHODS["simkd"]


class SimKDModel(MethodModel):
    """Student, projector and the teacher's head: what SimKD (Chen et al., CVPR 2022) trains and inference runs.

    Args:
        student: a timm model with ``forward_features``.
        teacher: a timm model whose ``forward_head`` reads the map: global average pooling, not a class token.
        image: one image (1, C, H, W) of the training size, to try both on.
        teacher_image: the same normalised for the teacher; None for ``image``.
        factor: the projector's inner width is the teacher's channels // factor.

    Raises:
        ValueError: a teacher whose head ignores the map or cannot be separated from it; no map of a known layout.
    """

    def __init__(
        self, student: Any, teacher: Any, image: Tensor, *, teacher_image: Tensor | None = None, factor: int = 2
    ) -> None:
        how: dict[str, Any] = {"teacher_image": teacher_image, "settings": {"factor": factor}}
        parts = build_method(_SIMKD, student, teacher, image, **how)
        super().__init__(student, parts, unwrap_model(teacher).num_classes)

    def match(self, input: Tensor, teacher_features: Tensor) -> SimKDOutput:  # noqa: A002 (timm's name)
        """Return the logits and the distance to the teacher's ``forward_features`` output, per sample."""
        student_map = self.read(self.student, input).maps[LAST_MAP]
        teacher_map = cast(Layout, self.teacher_layout).to_map(teacher_features)
        return cast(SimKD, self.method).match(student_map, teacher_map)

    @classmethod
    def around(cls, student: Any, parts: Parts, num_classes: int) -> "SimKDModel":
        """Build the model from existing parts."""
        model = cls.__new__(cls)
        MethodModel.__init__(model, student, parts, num_classes)
        return model


class DiSKSimKDTask(DiSKTask):
    """``DiSKTask(..., method="simkd")``; ``feature_weight`` is its ``weight``, ``factor`` the method's setting."""

    model_of = staticmethod(SimKDModel.around)

    def __init__(
        self, *models: Any, feature_weight: FeatureWeight = "one_minus_guide", factor: int = 2, **settings: Any
    ) -> None:
        super().__init__(*models, method=_SIMKD, method_settings={"factor": factor}, weight=feature_weight, **settings)
