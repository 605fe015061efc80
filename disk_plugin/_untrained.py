"""Detects a guide that is in no optimizer, although gradients reach it, and a student that no gradient reaches."""

import gc
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from .loss import DiSKLoss


class GuideMoves:
    """Compares the guide's parameters and gradients, by value, with those at the end of the previous epoch.

    By value, because an optimizer may bypass torch's version counters and a stale gradient may remain in ``.grad``.
    Copies of both are held until the next epoch ends.
    """

    def __init__(self, loss: "DiSKLoss") -> None:
        self._loss, self._guide = loss, loss.guide
        self._before = self._copies()

    def judge(self, epoch: int) -> str | None:
        """End an epoch; return the text of a warning, or None.

        None if there is no new finite gradient (a frozen guide, or a student pass of Algorithm 1). If the guide moved
        (``GuideReplay`` may have done it), it is about the student, in an epoch of forwards whose student logits do not
        require grad. Else it is about the guide, unless an optimizer holds a parameter of it: its learning rate may be
        0, or a ``GradScaler`` skips its steps.
        """
        before, now = self._before, self._copies()
        seen, self._loss.student_seen = self._loss.student_seen, frozenset()
        self._before = now
        if any(name not in before for name in now):
            return None
        moved = any(_differ(before[name][0], value) for name, (value, _) in now.items())
        if not any(_is_new(before[name][1], gradient) for name, (_, gradient) in now.items()):
            return None
        if moved:
            return _student_message(epoch) if seen == {"frozen"} else None
        if self._is_held():
            return None
        return (
            f"the guide is not trained: gradients reached it in epoch {epoch}, but none of its parameters moved and no "
            f"optimizer holds them; give the optimizer [*student.parameters(), *disk.parameters()], or "
            f"distiller.parameters(), or freeze the guide by disk.guide.requires_grad_(False)"
        )

    def _copies(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return each trainable parameter's value and gradient."""
        return {
            name: (parameter.detach().clone(), None if parameter.grad is None else parameter.grad.detach().clone())
            for name, parameter in self._guide.named_parameters()
            if parameter.requires_grad and not is_lazy(parameter)
        }

    def _is_held(self) -> bool:
        """Search all objects for an optimizer, as parameters do not know theirs: slow, so only before a warning."""
        own = {id(parameter) for parameter in self._guide.parameters()}
        return any(
            id(parameter) in own
            for thing in gc.get_objects()
            if issubclass(type(thing), torch.optim.Optimizer)  # isinstance() would run the __class__ of lazy objects
            for group in getattr(thing, "param_groups", ())
            for parameter in group["params"]
        )


def _student_message(epoch: int) -> str:
    return (
        f"the student is not trained: in no batch of epoch {epoch} do its logits require grad, and only the guide "
        f"moved; compute them outside torch.no_grad(), without detach() and with the student's parameters unfrozen (in "
        f"an epoch of the guide alone all is well)"
    )


def _differ(before: Tensor, now: Tensor) -> bool:
    """Whether the values differ; a tensor may have been moved to another device."""
    return before.shape != now.shape or not torch.equal(before.to(now), now)


def _is_new(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether there is a new gradient, finite and not all 0."""
    if now is None or not bool(now.isfinite().all() and now.any()):
        return False
    return before is None or _differ(before, now)
