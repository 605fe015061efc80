"""Algorithm 1's guide passes, the only place where they are made: over the data, or on the record of the student's."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..distributed import average_gradients, mean_over_processes
from ..loss import DiSKLoss
from ..replay import GuideReplay
from .recipe import Recipe

Passes = Callable[[int], Iterable[Iterable[Any]]]  # how many -> the batches of each


class GuidePasses:
    """The guide's half of Algorithm 1, Kag et al. (ICLR 2023), with the student held fixed.

    The guide stays outside DistributedDataParallel, which wants every gradient in every step: its parameters are
    broadcast once (``broadcast``) and its gradients averaged here.

    Args:
        disk: the loss that owns the guide.
        recipe: how often.
        optimizer: of the guide's parameters, and no others.
        rate: the guide's learning rate in an epoch of the host, counted from 0; None to leave the optimizer's.
        seed: of the record's order and choice.

    Attributes:
        passes: over the data so far.
        replay: the record, or None.
    """

    def __init__(
        self,
        disk: DiSKLoss,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        *,
        rate: Callable[[int], float] | None = None,
        seed: int = 0,
    ) -> None:
        self.disk, self.recipe, self.optimizer, self.rate, self.passes = disk, recipe, optimizer, rate, 0
        self.replay: GuideReplay | None = None
        if recipe.replay:
            self.replay = GuideReplay(
                disk, optimizer, capacity=recipe.replay_capacity, batch_size=recipe.replay_batch_size, seed=seed
            )

    def run(self, epoch: int, passes: Passes, guide_loss: Callable[[Any], Tensor], *, fresh: bool | None = None) -> int:
        """Make what is due before an epoch of the host, counted from 0; return how many passes over the data.

        Args:
            epoch: the host's.
            passes: gives the batches of so many passes, see ``repeated``.
            guide_loss: evaluates ``terms.guide_loss`` of a batch, nothing of the student being trained.
            fresh: whether none was made yet; None to tell by the passes counted here.
        """
        self.run_replay(epoch)  # what an epoch recorded whose rest the host skips
        due = self.recipe.due(epoch, fresh=not self.passes if fresh is None else fresh)
        if not due:
            return 0
        self.set_rate(epoch)
        self.disk.guide.train()
        for batches in passes(due):
            guide_pass(self.optimizer, batches, guide_loss)
            self.passes += 1
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer in self.disk.guide.buffers():
                if buffer.is_floating_point():  # BatchNorm's statistics, of which each process has seen its share
                    buffer.copy_(mean_over_processes(buffer))
        self.disk.guide.eval()
        self.disk.reset_statistics()  # the statistics that judge the iteration are those of the student's passes
        return due

    def record(
        self,
        epoch: int,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        teacher_features: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> None:
        """Record a batch of the last of the student's passes before the guide's, where those run on a record."""
        if self.replay is not None and self.recipe.ends_iteration(epoch):
            inputs = student_logits, teacher_logits, target, teacher_features
            self.replay.record(*inputs, sample_weight=sample_weight)

    def run_replay(self, epoch: int) -> None:
        """Make the guide's passes before the host's epoch on what is recorded, if anything is."""
        if self.replay is not None and len(self.replay):
            self.set_rate(epoch)
            self.replay.train_guide(self.recipe.guide_passes)

    def set_rate(self, epoch: int) -> None:
        """Bring the guide's learning rate to an epoch of the host, counted from 0."""
        if self.rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(epoch)

    @torch.no_grad()
    def broadcast(self) -> None:
        """Start every process from the first one's guide; nothing without a process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for tensor in self.disk.guide.state_dict().values():
            dist.broadcast(tensor, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, how many passes over the data there were, and what a replay has beside it."""
        replay = {} if self.replay is None else self.replay.state_dict()
        return {**replay, "optimizer": self.optimizer.state_dict(), "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up again; rates and decays stay those given here.

        Raises:
            RuntimeError: the state of another kind of optimizer.
        """
        loaded, groups = state["optimizer"], self.optimizer.param_groups
        kept = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        for group, settings in zip(loaded["param_groups"], kept, strict=False):
            if group.keys() - {"params"} != settings.keys():
                raise RuntimeError(
                    f"the guide's optimizer must have the settings {sorted(settings)}, got {sorted(group)}: the run "
                    f"had another one"
                )
        if self.replay is not None and "generator" in state:
            self.replay.load_state_dict({name: value for name, value in state.items() if name != "passes"})
        else:  # of a run without one: it begins here
            self.optimizer.load_state_dict(loaded)
        for group, settings in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(settings)
        self.passes = state["passes"]


def guide_pass(optimizer: torch.optim.Optimizer, batches: Iterable[Any], guide_loss: Callable[[Any], Tensor]) -> None:
    """Pass over batches once, a step of the guide's optimizer for each, on the mean gradient of all processes."""
    for batch in batches:
        loss = guide_loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        optimizer.step()


def repeated(loader: Iterable[Any]) -> Passes:
    """Pass over a loader as often as asked; afterwards the process's random numbers are put back.

    So the student sees its samples in the order of a run without guide passes.
    """

    def passes(count: int) -> Iterator[Iterable[Any]]:
        with preserved_random_state():
            for _ in range(count):
                yield loader

    return passes


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave the generators of Python, NumPy and torch afterwards as they were."""
    python, numpy = random.getstate(), sys.modules.get("numpy")  # which a loader draws from only if it is loaded
    array = None if numpy is None else numpy.random.get_state()
    # on a GPU a loader may erase random parts of the images there
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(array)
