"""Random numbers of one call: the generators of the CPU and of one device, seeded and put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of the device, and restore them on exit; other GPUs are not touched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_generators(seed, device)
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of the device."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU's generator
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
