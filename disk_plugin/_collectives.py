"""Means over processes, of values and of gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist

Group = dist.ProcessGroup | None


@torch.no_grad()
def mean_over_processes(value: Tensor, process_group: Group = None) -> Tensor:
    """Return the mean of ``value`` over ranks, on every rank; ``value`` itself without a process group.

    As ``DiSKLoss.reduce_mean`` it gives all ranks one hinge, that of the full batch; every rank must then evaluate the
    loss equally often. Every rank has equal weight, as in DistributedDataParallel's mean of the gradients.

    Args:
        value: a floating-point tensor of the same shape on every rank; half precision is summed in float32.
        process_group: the ranks to average over; None for all.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return value
    total = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
    dist.all_reduce(total, group=process_group)
    return (total / dist.get_world_size(process_group)).to(value.dtype)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], process_group: Group = None) -> None:
    """Replace gradients by their means over ranks, in one all-reduce; does nothing without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]), process_group)
    parts = torch.split(mean, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
