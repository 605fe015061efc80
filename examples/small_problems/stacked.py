"""README's loop for many seeds at once: every seed has its own student, loss and scheduler, vectorized.

The seeds' parameters and buffers are rows of stacked tensors (``torch.func``), so that a step of 20 seeds takes about
four times as long as one seed's. The modules stay usable: each may be inspected, called or saved separately.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, DualScheduler, functional

from .problems import Problem
from .training import LEARNING_RATE, MOMENTUM, batches


class CrossEntropy(nn.Module):
    """Plain cross-entropy, with the other losses' signature."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, features: Tensor) -> Tensor:
        """Return the mean."""
        return F.cross_entropy(student_logits, target)


class KD(nn.Module):
    """Plain distillation, with the other losses' signature."""

    def __init__(self, *, ce_weight: float, temperature: float) -> None:
        super().__init__()
        self.settings = {"ce_weight": ce_weight, "distill_weight": 1 - ce_weight, "temperature": temperature}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, features: Tensor) -> Tensor:
        """Return the mean."""
        return functional.kd_loss(student_logits, teacher_logits, target, **self.settings)


class Seeds:
    """Modules of one class, one per seed, called by vmap; their tensors become rows of stacked ones."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.parameters, self.buffers = stack_module_state(modules)
        for name, stacked in self.parameters.items():
            for module, row in zip(modules, stacked.detach(), strict=True):
                module.get_parameter(name).data = row
        for name, stacked in self.buffers.items():
            path, _, leaf = name.rpartition(".")
            for module, row in zip(modules, stacked, strict=True):
                module.get_submodule(path)._buffers[leaf] = row

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Call each module on its row of the inputs."""
        return vmap(self._call)(self.parameters, self.buffers, *inputs)

    def _call(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        called: Tensor = functional_call(self.modules[0], (parameters, buffers), inputs)
        return called


def train_seeds(
    problem: Problem,
    starts: list[nn.Module],
    losses: list[nn.Module],
    seeds: list[int],
    passes: int,
    after_epoch: Callable[[list[nn.Module]], None] = lambda students: None,
) -> list[nn.Module]:
    """Train one student per seed from ``starts``, which are not modified; return the students.

    ``after_epoch`` is called with them at the end of each epoch, before the schedulers step.
    """
    students, together = Seeds([copy.deepcopy(start) for start in starts]), Seeds(losses)
    duals = [DualScheduler(loss, epochs=passes) for loss in losses if isinstance(loss, DiSKLoss)]
    parameters = [*students.parameters.values(), *together.parameters.values()]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes)
    x, y = problem.train
    for epoch in range(passes):
        for each in zip(*(batches(problem, seed, epoch) for seed in seeds), strict=True):
            index = torch.stack(each)
            outputs = students(x[index]), problem.teacher_logits[index], y[index], problem.teacher_features[index]
            optimizer.zero_grad()
            together(*outputs).sum().backward()  # each seed's gradient is that of its own loss
            optimizer.step()
        schedule.step()
        after_epoch(students.modules)
        for dual in duals:
            dual.step()
    return students.modules
