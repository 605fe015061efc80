"""The interface of a distillation method in these examples, and the two that need no guide."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import functional
from disk_plugin.features import Outputs
from disk_plugin.features.method import LAST_MAP


class Batch(NamedTuple):
    """Normalised images (N, 3, 32, 32), labels (N,), the teacher's outputs (N, C) and (N, D), positions (N,).

    ``teacher_map`` is the teacher's last feature map (N, D, H, W), where the views have it.
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor
    teacher_features: Tensor
    index: Tensor
    teacher_map: Tensor | None = None

    @property
    def teacher(self) -> Outputs:
        """What a method of the package reads of the teacher."""
        maps = {} if self.teacher_map is None else {LAST_MAP: self.teacher_map}
        return Outputs(self.teacher_logits, self.teacher_features, maps)


class Method(nn.Module):
    """A loss on the student's logits, with any further trainable modules and their optimizer."""

    searched_as: str | None = None  # the search that froze its settings, or none
    optimizer: torch.optim.Optimizer | None = None
    guide_passes = 0  # before equally many passes of the student
    step_every = 1  # epochs between steps of the schedule or passes of the guide
    reads_student = False  # whether ``forward`` gets the student's Outputs with features and head, not its logits
    reads_maps = False  # whether these Outputs have the student's last two maps, and the batch the teacher's last one
    needs: tuple[str, ...] = ()  # what the experiment makes for it: "rdms", "student_dim", "pair"
    extra_passes = 0.0  # student forwards per pass over the data beyond the student's own

    @classmethod
    def made(cls, settings: dict[str, Any], **run: Any) -> "Method":
        """Build it from its settings; ``run``: num_classes, feature_dim, epochs, budget and seed, as needed."""
        return cls(**settings)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss to backpropagate."""
        raise NotImplementedError

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers to step with the student's."""
        return [self.optimizer] if self.optimizer else []

    def end_epoch(self) -> dict[str, float]:
        """End an epoch; return its values to log."""
        return {}


class CE(Method):
    """Cross-entropy alone."""

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Ignore the teacher."""
        return F.cross_entropy(student_logits, batch.labels)


class KD(Method):
    """Plain distillation, eq. (1)."""

    searched_as = "kd"

    def __init__(self, *, ce_weight: float = 0.1, temperature: float = 4.0) -> None:
        super().__init__()
        self.settings = {"ce_weight": ce_weight, "distill_weight": 1 - ce_weight, "temperature": temperature}

    def extra_repr(self) -> str:
        """Show the settings, which identify a checkpoint."""
        return str(self.settings)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Return the weighted cross-entropy and divergence."""
        return functional.kd_loss(student_logits, batch.teacher_logits, batch.labels, **self.settings)
