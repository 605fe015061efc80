"""The teacher's accuracy for distillers without a guide, which do not report it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from disk_plugin.functional import DiSKTerms


class TeacherWatch:
    """Reads the teacher's predictions during training with hooks, on any number of replicas.

    Args:
        distiller: the host's ``DataParallel`` around a distiller with a ``teacher``.
        tell: called after each training step with terms, whose accuracies alone are valid, and the number of classes.
    """

    def __init__(self, distiller: Any, tell: Callable[[DiSKTerms, int], None]) -> None:
        self.tell = tell
        self._predicted: list[Tensor] = []  # one per replica, in order of arrival
        distiller.module.teacher.register_forward_hook(self._keep)
        distiller.register_forward_pre_hook(lambda *_: self._predicted.clear())
        distiller.register_forward_hook(self._compare, with_kwargs=True)

    def _keep(self, _: Any, __: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        if isinstance(logits, Tensor) and logits.ndim == 2:  # a fork's teacher may return something else
            self._predicted.append(logits.argmax(1))

    @torch.no_grad()
    def _compare(self, distiller: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Compare with the labels, unless the teacher saw another number of images."""
        target = kwargs.get("target")
        # DataParallel scatters a batch in the order of its devices
        shares = sorted(self._predicted, key=lambda share: -1 if share.device.index is None else share.device.index)
        logits = output[0] if isinstance(output, tuple) else None
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return
        if not distiller.training or target is None or sum(map(len, shares)) != len(target):
            return
        teacher = torch.cat([share.to(target.device) for share in shares]) == target
        student = logits.argmax(1) == target
        unknown = torch.zeros(len(target), device=target.device)
        right = {"correct": student.to(unknown), "teacher_correct": teacher.to(unknown), "counted": 1 + unknown}
        self.tell(DiSKTerms._make([unknown] * len(DiSKTerms._fields))._replace(**right), logits.shape[1])
