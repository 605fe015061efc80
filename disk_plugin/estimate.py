"""The budget's estimate: the student's error on held-out data."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ._modes import in_mode
from .taps import logits_of


@torch.no_grad()
def estimate_budget(student: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, ignore_index: int = -100) -> float:
    """Return the student's error rate, the paper's heuristic for the budget (Kag et al., ICLR 2023, section 3.2).

    "A good initialization for the budget is the error of [the] cross-entropy trained model": warm-start the student and
    measure on held-out training data. The error on data it was fitted to is too small, and that on the test set leaks
    the test set. The train/eval modes are restored afterwards.

    Args:
        student: a classifier, see :func:`disk_plugin.taps.logits_of` for its outputs.
        loader: batches (x, target) with class indices (N, ...).
        ignore_index: target value that is ignored.

    Returns:
        Share of positions predicted incorrectly, in [0, 1]: use it as ``budget`` in nats per sample.

    Raises:
        ValueError: the loader is empty, or its targets are not class indices of the predictions' shape.
    """
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    wrong = count = 0.0
    with in_mode(student, training=False):
        for x, target in loader:
            target = target.to(device)
            predicted = logits_of(student(x.to(device))).argmax(1)
            if target.shape != predicted.shape:
                raise ValueError(
                    f"target must be class indices of shape {tuple(predicted.shape)}, got shape {tuple(target.shape)}"
                )
            counts = target != ignore_index
            wrong += ((predicted != target) & counts).sum().item()
            count += counts.sum().item()
    if not count:
        raise ValueError("loader must yield at least one sample that is not ignored, got none")
    return wrong / count
