"""Random numbers that the host does not notice."""

from contextlib import AbstractContextManager

import torch


def unseen_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Restore the generators afterwards, so that a baseline with the same seed sees the same batches."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
