"""What a distillation method is in these examples, and the two that need no guide."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import functional


class Batch(NamedTuple):
    """Normalised images (N, 3, 32, 32), labels (N,), the teacher's outputs (N, C) and (N, D), positions (N,)."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor
    teacher_features: Tensor
    index: Tensor


class Method(nn.Module):
    """What turns a student's logits into a loss; it owns what it trains beside the student, with its optimizer."""

    searched_as: str | None = None  # whose settings the search froze for it: "kd", "disk" or none
    optimizer: torch.optim.Optimizer | None = None
    guide_passes = 0  # before every as many passes of the student
    step_every = 1  # epochs after which all comes anew: steps of the schedule, passes of the guide
    extra_passes = 0.0  # student forwards per pass over the data beyond the student's own

    @classmethod
    def made(cls, settings: dict[str, Any], **run: Any) -> "Method":
        """Build it from its settings; ``run`` tells num_classes, feature_dim, epochs, budget and seed, where needed."""
        return cls(**settings)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss whose backward trains the student, and what trains with it."""
        raise NotImplementedError

    def end_epoch(self) -> dict[str, float]:
        """Close an epoch; return what to log of it."""
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
        """Show the settings; a checkpoint is told by them."""
        return str(self.settings)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Weigh cross-entropy and divergence."""
        return functional.kd_loss(student_logits, batch.teacher_logits, batch.labels, **self.settings)
