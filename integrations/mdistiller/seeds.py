"""Random numbers of a seeded run: what it draws depends on the seed and the epoch, not on what came before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed the process for an epoch counted from 1; 0 is what precedes them all, the initial weights."""
    seed_generators(seed, epoch)
    torch.backends.cudnn.benchmark = False  # it would choose kernels by their time, and so rounding by chance
    torch.backends.cudnn.deterministic = True


def seed_generators(seed: int, *key: int) -> None:
    """Seed Python, NumPy and torch; the loader takes its order, and its workers their seeds, from torch's generator.

    Seed and key are mixed: with their sum, an epoch of one seed would be the epoch before it of the next seed.
    """
    words = np.random.SeedSequence(seed % 2**64, spawn_key=key).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)  # noqa: NPY002 (the host's own generator)
    torch.manual_seed(int(words[2]))


@contextmanager
def apart(number: int) -> Iterator[None]:
    """Draw other random numbers inside, by a number; outside, go on as if none had been drawn."""
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        seed_generators(int(torch.randint(2**62, ())), number)
        yield
    random.setstate(python)
    np.random.set_state(array)  # noqa: NPY002


def restart_workers(loader: Any) -> None:
    """Let workers that outlive an epoch be started anew: their generators would go on from the pass before."""
    if getattr(loader, "persistent_workers", False):
        loader._iterator = None
