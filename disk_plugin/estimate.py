"""The budget's estimate: the student's error on held-out data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ._batches import first_two
from ._modes import in_mode
from .taps import logits_of


@torch.no_grad()
def estimate_budget(student: nn.Module, loader: Iterable[Any], *, ignore_index: int = -100) -> float:
    """Return the student's error rate, the paper's heuristic for the budget (Kag et al., ICLR 2023, section 3.2).

    "A good initialization for the budget is the error of [the] cross-entropy trained model": train the student with
    cross-entropy and measure on training data held out from it. The error on data it was fitted to is too small, and
    that on the test set leaks the test set.

    **An upper end.** In the search on CIFAR-100 the estimate was .79, and the best budgets were .1 (``multiplier=50``,
    ``presets.CIFAR100_SEARCHED``) and .02 (``multiplier=1000``): docs/evidence/cifar100_settings.md. For a hard task
    try those too.

    The student runs in evaluation mode, on its own device; each module's mode is restored.

    Args:
        student: a classifier; for its outputs see ``disk_plugin.taps.logits_of``.
        loader: batches (x, target, ...), target class indices (N,) or (N, d1, ...); other entries are not read.
        ignore_index: target value that is ignored.

    Returns:
        Error rate over the targets that are not ignored, in [0, 1]: pass it as ``budget``, in nats per sample.

    Raises:
        ValueError: the loader is empty, its targets are not class indices of the predictions' shape, or the student
            gives NaN.
        TypeError: batches that are not tuples.
    """
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    wrong = count = 0.0
    with in_mode(student, training=False):
        for x, target in first_two(loader, "loader"):
            target, logits = target.to(device), logits_of(student(x.to(device)))
            predicted = logits.argmax(1)
            if target.shape != predicted.shape:
                raise ValueError(
                    f"target must be class indices of shape {tuple(predicted.shape)}, got shape {tuple(target.shape)}"
                )
            counts = target != ignore_index
            if (logits.isnan().any(1) & counts).any():
                raise ValueError("student must give logits without NaN, got NaN")
            wrong += ((predicted != target) & counts).sum().item()
            count += counts.sum().item()
    if not count:
        raise ValueError("loader must yield at least one sample that is not ignored, got none")
    return wrong / count
