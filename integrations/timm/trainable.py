"""The module for the host's optimizer, DDP, compiler and clipping: student, method and, in joint mode, guide."""

from collections.abc import Callable

from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import unwrap_model
from torch import Tensor, nn

from disk_plugin._modes import without_autocast
from disk_plugin.features.method import Method, Outputs

from .model import MethodModel, Parts, Reader


class DiSKTrainableModule(FeatureDistillationTrainableModule):
    """Student, method and guide in one forward, so that DistributedDataParallel synchronises all of them.

    It has the guide and not its loss, whose buffers (statistics, multiplier) each rank keeps for itself. The host's
    base class maps the student's ``no_weight_decay`` and layer-decay groups; other parameters are in the last group.

    Args:
        student: the model of inference: the student, or the ``MethodModel`` around it.
        guide: None if it has its own optimizer.
        method: None without one, or if it is part of the ``MethodModel``.
        read: reads the method's inputs from the student.
    """

    def __init__(
        self, student: nn.Module, guide: nn.Module | None, method: Method | None = None, read: Reader | None = None
    ) -> None:
        super().__init__(student)
        self.guide, self.method, self.read = guide, method, read or Reader()

    def forward(
        self,
        input: Tensor,  # noqa: A002 (timm's name)
        target: Tensor,
        teacher: Outputs,
        shown: Outputs | None,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return logits (N, C), guide logits (N,) and the method's losses per sample by name.

        ``teacher`` are the teacher's outputs for the guide, ``shown`` those for the method.
        """
        losses: dict[str, Tensor] = {}
        if shown is not None and isinstance(self.student, MethodModel):
            inner = self.student
            logits, losses = inner.method.evaluate(inner.read(inner.student, input), shown, target)
        elif shown is not None and self.method is not None:
            logits, losses = self.method.evaluate(self.read(self.student, input), shown, target)
        else:
            logits = self.student(input)
        if self.guide is None:
            return logits, None, losses
        with without_autocast(teacher.logits):
            inputs = [teacher.logits] if teacher.features is None else [teacher.logits, teacher.features]
            return logits, self.guide(*inputs), losses


def trainable(
    student: nn.Module, guide: nn.Module | None, parts: Parts | None, model_of: Callable[..., MethodModel]
) -> DiSKTrainableModule:
    """Build the module to train; ``model_of`` builds the model of a method that predicts."""
    if parts is None:
        return DiSKTrainableModule(student, guide)
    if parts.method.own_prediction:
        return DiSKTrainableModule(model_of(student, parts, unwrap_model(student).num_classes), guide)
    return DiSKTrainableModule(student, guide, parts.method, parts.student)
