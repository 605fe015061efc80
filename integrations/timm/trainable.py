"""What the host's optimizer, DDP, compiler and clipping see: the student and, in joint mode, the guide."""

from timm.task.distillation import FeatureDistillationTrainableModule
from torch import Tensor, nn

from disk_plugin._modes import without_autocast


class DiSKTrainableModule(FeatureDistillationTrainableModule):
    """Student and guide in one forward, so that DistributedDataParallel synchronises both.

    The guide alone and not its loss, whose buffers (statistics, multiplier) each process keeps for itself.
    The host's base class maps the student's ``no_weight_decay`` and layer-decay groups, the guide is in the last group.
    """

    def __init__(self, student: nn.Module, guide: nn.Module | None) -> None:
        super().__init__(student)
        self.guide = guide

    def forward(
        self,
        input: Tensor,  # noqa: A002 (timm's name)
        teacher_logits: Tensor,
        teacher_features: Tensor | None,
        teacher_map: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return logits (N, C), guide logits (N,) and, of a ``SimKDModel``, the distance to the teacher's map (N,)."""
        if teacher_map is None:
            logits, error = self.student(input), None
        else:
            logits, error = self.student.match(input, teacher_map)
        if self.guide is None:
            return logits, None, error
        with without_autocast(teacher_logits):
            inputs = [teacher_logits] if teacher_features is None else [teacher_logits, teacher_features]
            return logits, self.guide(*inputs), error
