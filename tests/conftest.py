"""What every test starts from: one seed, one thread (busy machines slow small tensors on many threads tenfold)."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
