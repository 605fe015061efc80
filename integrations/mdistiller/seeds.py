"""Seeding: the random numbers of an epoch depend on the seed and the epoch, not on earlier epochs."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed the process for an epoch, counted from 1; 0 is for the initial weights."""
    seed_generators(seed, epoch)
    torch.backends.cudnn.benchmark = False  # else the choice of kernels, and so rounding, depends on timings
    torch.backends.cudnn.deterministic = True


def seed_generators(seed: int, *key: int) -> None:
    """Seed Python, NumPy and torch; the loader's order and its workers' seeds come from torch's generator.

    Seed and key are mixed: with a sum, epoch e + 1 of one seed would equal epoch e of the next seed.
    """
    words = np.random.SeedSequence(seed % 2**64, spawn_key=key).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)  # noqa: NPY002 (the host's own generator)
    torch.manual_seed(int(words[2]))


@contextmanager
def apart(number: int) -> Iterator[None]:
    """Seed the generators from their current state and ``number``; restore them on exit."""
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        seed_generators(int(torch.randint(2**62, ())), number)
        yield
    random.setstate(python)
    np.random.set_state(array)  # noqa: NPY002


def restart_workers(loader: Any) -> None:
    """Restart persistent workers, whose generators would continue from the previous pass."""
    if getattr(loader, "persistent_workers", False):
        loader._iterator = None
