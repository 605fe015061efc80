"""What several processes have to agree on."""

import torch
from torch import Tensor
from torch import distributed as dist

from .loss import DiSKLoss


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of each process's ``value``, on every process; ``value`` itself without a process group.

    As ``DiSKLoss.reduce_mean`` it gives all processes one hinge, that of the whole batch: every process must then
    evaluate the loss equally often. Processes weigh the same, as in DistributedDataParallel's mean of the gradients.

    Args:
        value: a floating-point tensor of the same shape on every process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@torch.no_grad()
def share_statistics(disk: DiSKLoss) -> None:
    """Give every process the epoch's statistics of all, so that their schedulers decide alike: before ``dual.step()``.

    Args:
        disk: each process's own loss, unwrapped.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    seen = disk.epoch_statistics
    sums, smallest, largest = seen[:2].clone(), seen[2:3].clone(), seen[3:].clone()
    dist.all_reduce(sums)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    seen.copy_(torch.cat([sums, smallest, largest]))


@torch.no_grad()
def share_student_temperature(disk: DiSKLoss) -> None:
    """Give every process the mean of what each has fitted on its own batch; nothing unless it is fitted.

    Args:
        disk: each process's own loss, unwrapped.
    """
    if disk.fit_student_temperature:
        for fitted in (disk.fitted_student_temperature, disk.student_temperature_moments):
            fitted.copy_(mean_over_processes(fitted))
