"""What every test starts from: one seed, one thread count, no network."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
