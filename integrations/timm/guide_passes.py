"""Algorithm 1 in timm: passes over the data that train the guide alone, with an optimizer of its own."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch import distributed as dist

from disk_plugin import DiSKLoss
from disk_plugin.distributed import mean_over_processes
from disk_plugin.features.guided import GuidedFeatureTerms
from disk_plugin.functional import DiSKTerms
from disk_plugin.replay import GuideReplay

from .recipe import Recipe
from .teacher import TeacherOutputs


class GuidePasses:
    """The guide's half of Algorithm 1, Kag et al. (ICLR 2023), with the student held fixed.

    The guide stays outside DistributedDataParallel, which wants every gradient in every step: its parameters are
    broadcast once and its gradients averaged here.

    Args:
        disk: the loss that owns the guide.
        recipe: how often, and with which optimizer.
        epochs: of the host, over which the learning rate falls to 0; None to keep it.
    """

    def __init__(self, disk: DiSKLoss, recipe: Recipe, epochs: int | None) -> None:
        self.disk, self.recipe, self.epochs, self.passes = disk, recipe, epochs, 0
        self.optimizer = create_optimizer_v2(
            disk.guide,
            opt=recipe.guide_opt,
            lr=recipe.guide_lr,
            momentum=recipe.guide_momentum,
            weight_decay=recipe.guide_weight_decay,
        )
        self.replay: GuideReplay | None = None
        if recipe.replay:
            self.replay = GuideReplay(
                disk, self.optimizer, capacity=recipe.replay_capacity, batch_size=recipe.replay_batch_size
            )

    def run(
        self,
        epoch: int,
        loader: Iterable[tuple[Tensor, Tensor]],
        terms: Callable[[Tensor, Tensor], DiSKTerms | GuidedFeatureTerms],
        *,
        prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda image, target: (image, target),
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> int:
        """Make the passes that are due; ``terms`` evaluates a batch. Return how many there were.

        The process's random numbers are put back, so that the student sees its samples in the order of a run without.
        """
        self.run_replay(epoch)  # what an epoch recorded whose rest the host skips
        passes = self.recipe.due(epoch, fresh=not self.passes)
        if not passes:
            return 0
        self._set_rate(epoch)
        self.disk.guide.train()
        with _random_numbers_put_back():
            for _ in range(passes):
                for image, target in loader:
                    with autocast():
                        loss = terms(*prepare(image, target)).mean().guide_loss
                    self.optimizer.zero_grad()
                    loss.backward()
                    self._average_gradients()
                    self.optimizer.step()
        self.passes += passes
        self.optimizer.zero_grad()
        for buffer in self.disk.guide.buffers():
            if buffer.is_floating_point():  # BatchNorm's statistics, of which each process has seen its share
                buffer.copy_(mean_over_processes(buffer))
        self.disk.guide.eval()
        self.disk.reset_statistics()
        return passes

    def record(self, epoch: int, logits: Tensor, target: Tensor, teacher: TeacherOutputs) -> None:
        """Record a batch of the last of the student's passes before the guide's, where those run on a record."""
        if self.replay is not None and (epoch + 1) % self.recipe.student_passes == 0:
            self.replay.record(logits, teacher[0], target, teacher[1])

    def run_replay(self, epoch: int) -> None:
        """Make the guide's passes before the host's epoch on what is recorded, if anything is."""
        if self.replay is not None and len(self.replay):
            self._set_rate(epoch)
            self.replay.train_guide(self.recipe.guide_passes)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, how many passes over the data there were, and what a replay has beside it."""
        replay = {} if self.replay is None else self.replay.state_dict()
        return {**replay, "optimizer": self.optimizer.state_dict(), "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up again; rates and decays stay those given here.

        Raises:
            RuntimeError: the state of another kind of optimizer.
        """
        loaded = state["optimizer"]
        kept = [{name: value for name, value in group.items() if name != "params"} for group in self._groups]
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
        for group, settings in zip(self._groups, kept, strict=True):
            group.update(settings)
        self.passes = state["passes"]

    def _set_rate(self, epoch: int) -> None:
        progress = min(epoch / self.epochs, 1.0) if self.epochs else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.guide_lr * (1 + math.cos(math.pi * progress)) / 2

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def broadcast(self) -> None:
        """Start every process from the first one's guide."""
        for tensor in self.disk.guide.state_dict().values():
            dist.broadcast(tensor, 0)

    @torch.no_grad()
    def _average_gradients(self) -> None:
        for parameter in self.disk.guide.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(mean_over_processes(parameter.grad))


@contextmanager
def _random_numbers_put_back() -> Iterator[None]:
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002 (the host draws from it)
    # on a GPU timm's loader erases random parts of the images there
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python)
    np.random.set_state(array)  # noqa: NPY002
