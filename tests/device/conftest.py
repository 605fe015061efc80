"""Each test here runs on the CPU and, where there is one, on a CUDA device; it expects the CPU's values in float64."""

import pytest
import torch

NO_CUDA = "no CUDA device: torch.cuda.is_available() is False"


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_CUDA)
    return request.param


@pytest.fixture
def cuda():
    """For what only a CUDA device has: its allocator's peak, graphs, the detection of synchronizations."""
    if not torch.cuda.is_available():
        pytest.skip(NO_CUDA)
    return "cuda"


@pytest.fixture(autouse=True)
def _failing_where_it_belongs():
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # or an asynchronous error would end a later test
