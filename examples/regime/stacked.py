"""Networks of the same shape trained as one: an MLP whose weights have leading dimensions, one entry per network."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

LEARNING_RATE, MOMENTUM = 0.1, 0.9


class Batch(NamedTuple):
    """Samples of each seed: x (S, B, D), y (S, B), the teacher's logits (S, B, C) and features (S, B, F)."""

    x: Tensor
    y: Tensor
    teacher_logits: Tensor
    teacher_features: Tensor

    def at(self, index: Tensor) -> "Batch":
        """Index samples (S, B), per seed."""
        rows = torch.arange(len(index))[:, None]
        return Batch(*(part[rows, index] for part in self))


class Stack:
    """MLPs with weights (settings, seeds, in, out): the arithmetic of nn.Linear, batched over all of them."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], activation: Callable[[Tensor], Tensor]) -> None:
        self.weights, self.biases, self.activation = weights, biases, activation

    @classmethod
    def fresh(cls, sizes: Sequence[int], seeds: Sequence[int], activation: Callable[[Tensor], Tensor]) -> "Stack":
        """Initialize one network per seed like nn.Linear."""
        weights, biases = [], []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for width, out in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(width)
            draws = [(2 * torch.rand(width + 1, out, generator=each) - 1) * bound for each in generators]
            stacked = torch.stack(draws)[None]  # (1, S, in + 1, out)
            weights.append(stacked[:, :, :-1].contiguous().requires_grad_())
            biases.append(stacked[:, :, -1:].contiguous().requires_grad_())
        return cls(weights, biases, activation)

    def copies(self, count: int) -> "Stack":
        """Return ``count`` independent copies of every network, one per setting."""
        weights, biases = (
            [value.detach().repeat_interleave(count, 0).requires_grad_() for value in values]
            for values in (self.weights, self.biases)
        )
        return Stack(weights, biases, self.activation)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (S, B, in) to logits (settings, S, B, C) and the last layer's input."""
        hidden = x[None]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = self.activation(hidden @ weight + bias)
        return hidden @ self.weights[-1] + self.biases[-1], hidden

    @property
    def parameters(self) -> list[Tensor]:
        """Return all parameters."""
        return [*self.weights, *self.biases]

    @torch.no_grad()
    def outputs(self, x: Tensor, size: int = 2000) -> tuple[Tensor, Tensor]:
        """Call the networks on many samples, in chunks."""
        logits, features = zip(*(self(piece) for piece in x.split(size, 1)), strict=True)
        return torch.cat(logits, 2), torch.cat(features, 2)

    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Return each network's accuracy, percent: (settings, S)."""
        return share(self.outputs(x)[0].argmax(-1) == y)


def share(right: Tensor) -> Tensor:
    """Return the percentage of True along the last dimension."""
    return 100 * right.double().mean(-1)


def batches(data: Batch, size: int, seeds: Sequence[int], passes: int) -> Iterator[list[Batch]]:
    """Yield each pass's batches, shuffled separately per seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(passes):
        order = torch.stack([torch.randperm(data.y.shape[1], generator=each) for each in generators])
        yield [data.at(index) for index in order.split(size, 1)]


def fit(
    parameters: list[Tensor],
    loss_of: Callable[[Batch], Tensor],
    data: Batch,
    *,
    passes: int,
    batch_size: int,
    seeds: Sequence[int],
    after_pass: Callable[[], None] = lambda: None,
) -> None:
    """SGD .1, momentum .9, cosine, on a sum of losses; each network's gradient is that of its own loss."""
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes)
    for pieces in batches(data, batch_size, seeds, passes):
        for batch in pieces:
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        after_pass()


def cross_entropy(stack: Stack, batch: Batch) -> Tensor:
    """Return the sum of the networks' mean cross-entropies."""
    logits = stack(batch.x)[0].flatten(0, 1)
    count = len(logits) // len(batch.y)
    y = batch.y.repeat(count, 1)
    return len(logits) * nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
