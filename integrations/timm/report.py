"""An epoch's means under timm's names: DiSK's terms, both accuracies, the host's own loss."""

import logging

import torch
from torch import Tensor
from torch import distributed as dist

from disk_plugin.epoch_report import EpochReport

_logger = logging.getLogger(__name__)


class TaskReport(EpochReport):
    """Means over the samples of an epoch, with the task loss, which does not depend on DiSK's schedule."""

    def __init__(self) -> None:
        super().__init__()
        self._task_loss: Tensor | None = None

    @torch.no_grad()
    def add_task_loss(self, loss: Tensor, samples: int) -> None:
        """Add a batch's task loss, before its weight."""
        summed = torch.stack([loss.detach().float() * samples, loss.new_tensor(float(samples), dtype=torch.float32)])
        summed = torch.where(summed.isfinite().all(), summed, 0.0)  # as the other means
        # MPS has no float64
        summed = summed if loss.device.type == "mps" else summed.double()
        self._task_loss = summed if self._task_loss is None else self._task_loss + summed

    def sum_over_processes(self) -> None:
        """All-reduce (sum) over ranks; each must have added at least one batch."""
        super().sum_over_processes()
        if self._task_loss is not None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._task_loss)

    def logged(self, task_loss_weight: float = 1.0) -> dict[str, float]:
        """Return the means by name; accuracies in percent, as timm's ``top1``; ``logged_loss`` with the task loss."""
        means = self.means()
        for side in ("student", "teacher"):
            if f"{side}_accuracy" in means:
                means[f"{side}_top1"] = 100 * means.pop(f"{side}_accuracy")
        if self._task_loss is not None:
            total, samples = self._task_loss.tolist()
            means["task_loss"] = total / samples if samples else float("nan")
            means["logged_loss"] += task_loss_weight * means["task_loss"]
        return means

    def judge_teacher(self, num_classes: int, *, quiet: bool, trained: bool) -> bool:
        """Warn of a teacher at chance or behind the student, unless ``quiet``; return whether it has been judged."""
        # a student that has been trained may be ahead for good reasons
        weak = self.weak_teacher(num_classes, beside_student=not trained)
        if weak is not None and not quiet and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            _logger.warning(f"DiSK: {weak}")
        return quiet or bool(self.means())
