"""Algorithm 1's guide passes, over the data or on a record of the student's passes."""

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

Passes = Callable[[int], Iterable[Iterable[Any]]]  # number of passes -> the batches of each


class GuidePasses:
    """The guide's half of Algorithm 1, Kag et al. (ICLR 2023), with the student fixed.

    The guide stays outside DistributedDataParallel, which needs every gradient in every step: its parameters are
    broadcast once (``broadcast``) and its gradients are averaged here.

    Args:
        disk: the loss that owns the guide.
        recipe: numbers of passes, and whether they are on a record.
        optimizer: of the guide's parameters, and no others.
        rate: epoch of the host, counted from 0 -> the guide's learning rate; None to leave the optimizer's.
        seed: of the record's order and choice of samples.

    Attributes:
        passes: number of passes over the data so far.
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
        """Make the guide passes that are due before an epoch of the host; return their number over the data.

        Args:
            epoch: of the host, counted from 0.
            passes: number of passes -> the batches of each, see ``repeated``.
            guide_loss: batch -> ``terms.guide_loss``, without a gradient for the student.
            fresh: whether no pass was made before; None to decide by ``self.passes``.
        """
        self.run_replay(epoch)  # recorded in an epoch that was interrupted, whose rest the host skips
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
                if buffer.is_floating_point():  # BatchNorm's statistics, which differ between ranks
                    buffer.copy_(mean_over_processes(buffer))
        self.disk.guide.eval()
        self.disk.reset_statistics()  # the scheduler is to see the statistics of the student's passes
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
        """Record a batch, if the guide's passes run on a record and this is the last student pass before them."""
        if self.replay is not None and self.recipe.ends_iteration(epoch):
            inputs = student_logits, teacher_logits, target, teacher_features
            self.replay.record(*inputs, sample_weight=sample_weight)

    def run_replay(self, epoch: int) -> None:
        """Make the guide's passes on the record, before an epoch of the host; does nothing if it is empty."""
        if self.replay is not None and len(self.replay):
            self.set_rate(epoch)
            self.replay.train_guide(self.recipe.guide_passes)

    def set_rate(self, epoch: int) -> None:
        """Set the guide's learning rate for an epoch of the host, counted from 0."""
        if self.rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(epoch)

    @torch.no_grad()
    def broadcast(self) -> None:
        """Broadcast the guide from rank 0; does nothing without a process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for tensor in self.disk.guide.state_dict().values():
            dist.broadcast(tensor, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, the number of passes over the data, and the record's state."""
        replay = {} if self.replay is None else self.replay.state_dict()
        return {**replay, "optimizer": self.optimizer.state_dict(), "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state; learning rates, decays and the other settings stay those of this optimizer.

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
        else:  # of a run without a record, which begins here
            self.optimizer.load_state_dict(loaded)
        for group, settings in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(settings)
        self.passes = state["passes"]


def guide_pass(optimizer: torch.optim.Optimizer, batches: Iterable[Any], guide_loss: Callable[[Any], Tensor]) -> None:
    """Make one step of the guide's optimizer per batch, on the mean gradient over ranks."""
    for batch in batches:
        loss = guide_loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        optimizer.step()


def repeated(loader: Iterable[Any]) -> Passes:
    """Return a function that yields a loader as often as asked, and then restores the state of all random generators.

    That includes the loader's own and its samplers'. So the student sees its samples in the order of a run without
    guide passes.
    """

    def passes(count: int) -> Iterator[Iterable[Any]]:
        with preserved_random_state(*_generators_of(loader)):
            for _ in range(count):
                yield loader

    return passes


def _generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators that a DataLoader and its samplers were given."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


@contextmanager
def preserved_random_state(*generators: torch.Generator) -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch, and those given, on exit."""
    own = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), sys.modules.get("numpy")  # used by a loader only if it is imported
    array = None if numpy is None else numpy.random.get_state()
    # a loader may draw on the GPU too, for random erasing
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(array)
