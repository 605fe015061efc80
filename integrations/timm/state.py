"""What a checkpoint keeps of DiSK beside the student: ``task_state``."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from disk_plugin import DiSKLoss
from disk_plugin.distributed import mean_over_processes

if TYPE_CHECKING:
    from .guided_task import GuidedTask

_logger = logging.getLogger(__name__)


def state_of(task: "GuidedTask") -> dict[str, Any]:
    """Return the guide and the loss's scalars, the schedule's progress and the guide's optimizer, if it has one."""
    state: dict[str, Any] = {"disk": task.disk.state_dict()}
    if task.dual is not None:
        state["dual"] = task.dual.state_dict()
    if task.guide_passes is not None:
        state["guide_optimizer"] = task.guide_passes.optimizer.state_dict()
    return state


def load(task: "GuidedTask", state: Mapping[str, Any] | None) -> None:
    """Load what ``state_of`` returned.

    Raises:
        RuntimeError: nothing to load and no leave to go on, or a state of another mode or guide.
    """
    if not state or "disk" not in state:
        if not task.allow_fresh_guide:
            raise RuntimeError(
                "the checkpoint must hold DiSK's state (guide, multiplier, budget, their progress) under 'task_state', "
                f"got {sorted(state or {}) or 'none'}: it is of a run without DiSK. --disk-allow-fresh-guide "
                "(allow_fresh_guide=True) goes on with its student and a new guide"
            )
        _logger.warning("The checkpoint holds no state of DiSK: its student goes on with an untrained guide.")
        return
    expected = set(state_of(task))
    if set(state) != expected:
        raise RuntimeError(
            f"the checkpoint must hold {sorted(expected)}, got {sorted(state)}: the run was joint and is now "
            f"alternating or the reverse, or only one of the two has schedules"
        )
    task.disk.load_state_dict(state["disk"])
    if task.dual is not None:
        task.dual.load_state_dict(state["dual"])
    if task.guide_passes is not None:
        task.guide_passes.optimizer.load_state_dict(state["guide_optimizer"])


@torch.no_grad()
def share_statistics(disk: DiSKLoss) -> None:
    """Give every process the statistics of all, so that all of them decide alike."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    seen = disk.epoch_statistics
    sums, smallest, largest = seen[:2].clone(), seen[2].clone(), seen[3].clone()
    dist.all_reduce(sums)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    seen.copy_(torch.cat([sums, smallest[None], largest[None]]))


@torch.no_grad()
def share_student_temperature(disk: DiSKLoss) -> None:
    """Give every process the mean of what each has fitted on its own batch."""
    if disk.fit_student_temperature:
        for fitted in (disk.fitted_student_temperature, disk.student_temperature_moments):
            fitted.copy_(mean_over_processes(fitted))
