"""A step recorded once as a CUDA graph and replayed; where that fails or gives other losses, the step as it is."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

EAGER, GRAPH, BRANCHES = "eager", "CUDA graph", "CUDA graph with parallel branches"
_WARM_UP = 3  # steps before a recording (libraries allocate and choose in the first ones), and as many to check it by
_TOLERANCE = 0.02  # of the mean loss: bfloat16, and sums in another order


def recorded(
    step: Callable[[bool], None], state: Sequence[Tensor], losses: Tensor, ways: Sequence[str] = (BRANCHES, GRAPH)
) -> tuple[Callable[[], object], str]:
    """Return a function that makes one step, and how it does: the fastest way that works on this device.

    Args:
        step: makes a step from ``state`` alone, all in place; its argument says whether branches may run in parallel.
        state: every tensor that a step changes. It is as it was when this returns.
        losses: the one of these to which a step adds its losses: by them a recording is compared with the step.
        ways: what to try, in this order; nothing is recorded on a CPU.
    """
    if losses.device.type == "cpu":
        ways = ()
    # detached: a clone's graph would keep alive the parameters' gradient accumulators, bound to the stream they were
    # made on, which a recording on another one must not wait for
    before = [tensor.detach().clone() for tensor in state] if ways else []
    for how in ways:
        try:
            graph = _graph(partial(step, how == BRANCHES), state, before, losses)
        except RuntimeError as error:
            warnings.warn(f"no {how} of a step, the next slower way is taken: {error}", stacklevel=2)
            continue
        finally:
            _restore(state, before)
        return graph.replay, how
    return lambda: step(False), EAGER


def _graph(
    step: Callable[[], None], state: Sequence[Tensor], before: Sequence[Tensor], losses: Tensor
) -> torch.cuda.CUDAGraph:
    """Record a step and replay it against the step itself.

    Raises:
        RuntimeError: it cannot be recorded, or the replay has other losses.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    expected = losses.flatten().tolist()
    _restore(state, before)
    graph = torch.cuda.CUDAGraph()
    # a recording that fails leaves its stream the current one
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        step()
    _restore(state, before)
    for _ in range(_WARM_UP):
        graph.replay()
    found = losses.flatten().tolist()
    if not alike(found, expected):
        raise RuntimeError(f"{_WARM_UP} replayed steps must have the losses {expected}, got {found}")
    return graph


def alike(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether sums of losses are the same but for rounding, each within 2 % and .02; NaN is like nothing."""
    pairs = zip(found, expected, strict=True)
    return all(abs(one - other) <= _TOLERANCE * max(abs(other), 1.0) for one, other in pairs)


@torch.no_grad()
def _restore(state: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(old)
