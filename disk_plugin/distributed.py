"""What several processes have to agree on."""

import torch
from torch import Tensor
from torch import distributed as dist


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of each process's ``value``, on every process; ``value`` itself without a process group.

    As ``DiSKLoss.reduce_usage`` it gives all processes one hinge, that of the whole batch: every process must then
    evaluate the loss equally often. Processes weigh the same, as in DistributedDataParallel's mean of the gradients.

    Args:
        value: a floating-point tensor of the same shape on every process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
