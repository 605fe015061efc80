"""What ranks must agree on: the hinge, the level of g, the guide's gradients, the scheduler's statistics."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from ._collectives import Group, average_gradients, mean_over_processes
from .features.guided import Guided
from .loss import DiSKLoss

__all__ = [
    "SharedGuide",
    "attach",
    "average_gradients",
    "mean_over_processes",
    "share_statistics",
    "share_student_temperature",
    "split_statistics",
]


def attach(disk: DiSKLoss | Guided, process_group: Group = None) -> "SharedGuide":
    """Synchronize the losses of all ranks: the same guide, one hinge and one gradient for the full batch.

    For loops that wrap only the student in DistributedDataParallel. The guide's parameters and the loss's buffers are
    broadcast from the group's rank 0. From then on each evaluation with gradients averages a few scalars (up to three
    small all-reduces): with a budget the usage, with a discount what the level of g and the guide's gradient depend on,
    and a fitted student temperature. Each backward that reaches the guide ends with an average of its gradients (one
    all-reduce). Every rank must therefore run the same number of forwards and backwards.

    Gradients are averaged at the end of backward, as in DistributedDataParallel: clipping, ``GradScaler.unscale_`` and
    any optimizer see the gradient of the full batch, and an overflow on one rank makes all ranks skip the step.
    Accumulated gradients are averaged correctly either way; with ``no_sync`` around all but the last micro-batch there
    is one all-reduce per step.

    Under gradient accumulation each micro-batch, over all ranks, has its own hinge. With k of them the guide's gradient
    is the full batch's if all are within the budget or all exceed it. Otherwise it differs by multiplier / k times the
    sum of (1[usage_j > budget] - 1[usage > budget]) grad usage_j; ``disk_plugin.accumulation.AccumulatedBatch``
    removes that difference.

    Args:
        disk: each rank's own loss, on its device, not inside DistributedDataParallel;
            a ``Guided`` to share its method's parameters too, if the method is also evaluated outside of it.
        process_group: the ranks that share a batch; None for all.

    Returns:
        A handle with ``detach()`` and, for micro-batches, ``no_sync()``; it need not be kept.

    Raises:
        RuntimeError: no process group is initialised; the loss is inside DistributedDataParallel (if it is wrapped
            later, its first backward raises); its ``reduce_mean`` is set already.
        ValueError: this rank is not in ``process_group``.
        TypeError: ``disk`` is neither a DiSKLoss nor a Guided.

    Examples:
        >>> from torch import distributed
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        >>> shared = attach(DiSKLoss(GuideHead(num_classes=10)))
        >>> distributed.destroy_process_group()
    """
    if not isinstance(disk.module if isinstance(disk, DistributedDataParallel) else disk, DiSKLoss | Guided):
        raise TypeError(f"disk must be a DiSKLoss or a Guided, got {type(disk).__name__}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "attach needs a process group, got none: call torch.distributed.init_process_group() before it, in "
            "processes that torchrun started"
        )
    if dist.get_rank(process_group) < 0:
        raise ValueError(f"process_group must hold this process, global rank {dist.get_rank()}, got one without it")
    _check_not_wrapped(disk)
    taken = _loss_in(disk).reduce_mean
    if taken is not None:
        raise RuntimeError(f"disk.reduce_mean must be None, got {taken!r}: is the loss attached already?")
    return SharedGuide(disk, process_group)


class SharedGuide:
    """Handle returned by ``attach``."""

    @torch.no_grad()
    def __init__(self, disk: DiSKLoss | Guided, process_group: Group) -> None:
        self._whole, self._disk, self._group = disk, _loss_in(disk), process_group
        self._averages, self._checked, self._backward = True, False, -1
        first = 0 if process_group is None else dist.get_global_rank(process_group, 0)
        for tensor in (*disk.parameters(), *disk.buffers()):
            dist.broadcast(tensor, first, group=process_group)
        self._disk.reduce_mean = _MeanOver(process_group)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for parameter in disk.parameters()
            if parameter.requires_grad
        ]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Skip the all-reduce of the guide's gradients; use it together with ``DistributedDataParallel.no_sync``."""
        before, self._averages = self._averages, False
        try:
            yield
        finally:
            self._averages = before

    def detach(self) -> None:
        """Stop synchronizing: each rank has its own hinge and gradient; parameters stay equal until the next step."""
        for hook in self._hooks:
            hook.remove()
        self._disk.reduce_mean = None

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """Queue ``_average``, once per backward, to run at its end, when all gradients are accumulated."""
        backward = torch._C._current_graph_task_id()
        if self._averages and backward != self._backward:
            self._backward = backward
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        if not self._checked:
            _check_not_wrapped(self._whole)  # two concurrent all-reduces of one gradient may collide
            self._checked = True
        average_gradients(self._whole.parameters(), self._group)


class _MeanOver:
    """``reduce_mean`` of an attached loss. A copy, or a pickle, of the loss has None: it has none of the hooks."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, value: Tensor) -> Tensor:
        return mean_over_processes(value, self._group)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


@torch.no_grad()
def share_statistics(disk: DiSKLoss, process_group: Group = None) -> None:
    """All-reduce the epoch's statistics, so that the schedulers of all ranks agree: call it before ``dual.step()``.

    Args:
        disk: each rank's own loss, unwrapped.
        process_group: the ranks that share them; None for all.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    seen = disk.epoch_statistics
    sums, smallest, largest = seen[:5].clone(), seen[5:6].clone(), seen[6:].clone()
    dist.all_reduce(sums, group=process_group)
    dist.all_reduce(disk.epoch_batches, group=process_group)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=process_group)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    seen.copy_(torch.cat([sums, smallest, largest]))


@torch.no_grad()
def split_statistics(disk: DiSKLoss, process_group: Group = None) -> None:
    """Undo ``share_statistics``: give each process an equal part, after all have loaded what was shared.

    Args:
        disk: each process's own loss, unwrapped.
        process_group: the ranks that share them; None for all.
    """
    if dist.is_available() and dist.is_initialized():
        # the sums; smallest and largest g, which follow, are the same for all
        disk.epoch_statistics[:5] /= dist.get_world_size(process_group)


@torch.no_grad()
def share_student_temperature(disk: DiSKLoss, process_group: Group = None) -> None:
    """Average the fitted student temperature over ranks; does nothing unless it is fitted.

    For a loss without ``reduce_mean``, which averages it in each evaluation.

    Args:
        disk: each rank's own loss, unwrapped.
        process_group: the ranks that share it; None for all.
    """
    if disk.fit_student_temperature:
        for fitted in (disk.fitted_student_temperature, disk.student_temperature_moments):
            fitted.copy_(mean_over_processes(fitted, process_group))


def _loss_in(disk: DiSKLoss | Guided) -> DiSKLoss:
    return disk.disk if isinstance(disk, Guided) else disk


def _check_not_wrapped(disk: nn.Module) -> None:
    """Raise RuntimeError if DistributedDataParallel averages the guide's gradients itself."""
    if _wrapper(disk) is None:
        return
    gc.collect()  # a discarded wrapper may still be alive in a reference cycle
    wrapper = _wrapper(disk)
    if wrapper is not None:
        raise RuntimeError(
            f"attach expects a loss outside DistributedDataParallel, got one inside (it wraps a "
            f"{type(wrapper.module).__name__}), where the guide's gradients are averaged already: wrap the student "
            f"alone, or, instead of attach, set disk.reduce_mean = mean_over_processes, which shares the hinge"
        )


def _wrapper(disk: nn.Module) -> DistributedDataParallel | None:
    """Find the wrapper among all objects, as DistributedDataParallel leaves no mark on its module."""
    own = {id(parameter) for parameter in disk.parameters()}
    for thing in gc.get_objects():
        # type(), as isinstance() would run the __class__ of lazy objects
        if issubclass(type(thing), DistributedDataParallel) and own & {id(p) for p in thing.parameters()}:
            return thing  # type: ignore[no-any-return]
    return None
