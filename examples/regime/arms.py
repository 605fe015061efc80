"""The methods of the map: plain distillation in six settings, each form of DiSK in three."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from small_problems.stacked import Seeds
from torch import Tensor, nn

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.uniform import UniformGuide

from .stacked import Batch

TEMPERATURES = (1.0, 2.0, 4.0)
KD_SETTINGS: list[dict[str, float]] = [
    {"temperature": temperature, "ce_weight": weight, "distill_weight": 1 - weight}
    for temperature in TEMPERATURES
    for weight in (0.0, 0.1)
]


class Arm(NamedTuple):
    """A form of DiSK: its guide's constructor (number of classes, of features) and the loss's arguments."""

    guide: Callable[[int, int], nn.Module]
    loss: dict[str, Any]
    reads_features: bool = False


# the map's rows besides KD; the rule is about the first one's gain
ARMS: dict[str, Arm] = {
    "DiSK": Arm(GuideHead, {}, reads_features=True),  # the default, as README's loop has it
    "uniform": Arm(lambda classes, features: UniformGuide(discount="auto"), {}),
}


class Guided:
    """A loss, a guide and a scheduler per student, with the losses vectorized."""

    def __init__(self, arm: Arm, temperature: float, *, students: int, sizes: tuple[int, int], passes: int) -> None:
        self.arm = arm
        losses = [DiSKLoss(arm.guide(*sizes), temperature=temperature, **arm.loss) for _ in range(students)]
        self.stacked = Seeds(losses)
        self.duals = [DualScheduler(loss, epochs=passes) for loss in losses]

    @property
    def parameters(self) -> list[Tensor]:
        """Return the guides' parameters, stacked."""
        return list(self.stacked.parameters.values())

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum the losses of students (widths x seeds, B, C); the batch is one per seed."""
        widths = len(logits) // len(batch.y)
        inputs = [batch.teacher_logits, batch.y] + [batch.teacher_features] * self.arm.reads_features
        repeated = [value.repeat(widths, *[1] * (value.ndim - 1)) for value in inputs]
        return self.stacked(logits, *repeated).sum()

    def step(self) -> None:
        """End a pass."""
        for dual in self.duals:
            dual.step()


def kd(logits: Tensor, batch: Batch, settings: dict[str, float]) -> Tensor:
    """Sum of the students' losses under plain distillation, students (widths x seeds, B, C)."""
    widths = len(logits) // len(batch.y)
    teacher_logits, y = batch.teacher_logits.repeat(widths, 1, 1), batch.y.repeat(widths, 1)
    return len(logits) * functional.kd_loss(logits.flatten(0, 1), teacher_logits.flatten(0, 1), y.flatten(), **settings)


def best(validation: Sequence[float]) -> int:
    """Return the index of the first largest value."""
    return max(range(len(validation)), key=lambda i: validation[i])
