"""Random numbers of a seeded run."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the process; the loader takes its order, and its workers their seeds, from torch's generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the host's own generator)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False  # it would choose kernels by their time, and so rounding by chance
    torch.backends.cudnn.deterministic = True
