"""Students of one start side by side as one joint network, and the step that trains them, all on one device.

The joint network's grouped convolutions (see small_images/resnet.py) may also run as dense ones whose weight is zero
between the students: more arithmetic, which a GPU has, in kernels that it is better at. Which is faster is measured.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from small_images import data
from small_images.methods import Batch
from small_images.resnet import ResNet, State, joined, parted
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .methods import Method
from .sgd import SGD


class BlockDiagonalConv2d(nn.Conv2d):
    """A grouped convolution, its parameter as it was, evaluated as a dense one."""

    def __init__(self, grouped: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.weight, self.copies = grouped.weight, grouped.groups
        self.stride, self.padding = grouped.stride, grouped.padding
        eye = torch.eye(self.copies, device=self.weight.device).view(self.copies, 1, self.copies, 1, 1, 1)
        self.register_buffer("eye", eye, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every group's inputs into its own outputs alone."""
        own = self.weight.unflatten(0, (self.copies, -1)).unsqueeze(2)  # (M, outputs, 1, inputs, k, k)
        return F.conv2d(x, (own * self.eye).flatten(2, 3).flatten(0, 1), None, self.stride, self.padding)

    def extra_repr(self) -> str:
        """Show the shape of the parameter."""
        return f"{tuple(self.weight.shape)}, copies={self.copies}"


def densify(model: nn.Module) -> nn.Module:
    """Replace every grouped convolution in place; parameters and state keep their names."""
    for name, child in model.named_children():
        if isinstance(child, nn.Conv2d) and child.groups > 1:
            setattr(model, name, BlockDiagonalConv2d(child))
        else:
            densify(child)
    return model


def network(name: str, states: list[State], device: str, *, dense: bool) -> ResNet:
    """Return the joint network of students in these states."""
    model = ResNet(name, copies=len(states)).to(device, memory_format=torch.channels_last)
    model.load_state_dict(joined(states))
    return densify(model) if dense else model


def dense_is_faster(name: str, states: list[State], batch_size: int, device: str, repeats: int = 10) -> bool:
    """Time forward and backward of both forms of the joint network."""
    if len(states) == 1:
        return False
    # drawn on the host: after a recording that failed, torch may refuse to draw on the device
    images = torch.randn(batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
    seconds = {}
    for dense in (False, True):
        model = network(name, states, device, dense=dense)
        for repeat in range(-3, repeats):
            if not repeat:
                begin = _now(device)
            with precision(device):
                loss = model(images).float().square().mean()
            torch.autograd.grad(loss, list(model.parameters()))
        seconds[dense] = _now(device) - begin
    return seconds[True] < seconds[False]


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def precision(device: str) -> torch.autocast:
    """bfloat16 for the networks, with no casts kept: a recorded step must make them anew."""
    return torch.autocast(device, torch.bfloat16, cache_enabled=False)


class Data:
    """An epoch's images, labels and teacher's outputs, and the place that has been reached in it: fixed addresses."""

    def __init__(self, labels: Tensor, image_size: torch.Size, feature_dim: int, classes: int, batch_size: int) -> None:
        device, samples = labels.device, len(labels)
        self.labels, self.batch_size = labels, batch_size
        self.images = torch.zeros(samples, *image_size, dtype=torch.uint8, device=device)
        self.logits = torch.zeros(samples, classes, dtype=torch.half, device=device)
        self.features = torch.zeros(samples, feature_dim, dtype=torch.half, device=device)
        self.order = torch.arange(samples, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.within = torch.arange(batch_size, device=device)
        mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (data.MEAN, data.STD))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    @property
    def steps(self) -> int:
        """Whole batches in an epoch; the order's end that fills none is left out."""
        return len(self.labels) // self.batch_size

    def load(self, images: Tensor, outputs: tuple[Tensor, Tensor] | None) -> None:
        """Take up an epoch's view."""
        self.images.copy_(images)
        if outputs is not None:
            self.logits.copy_(outputs[0])
            self.features.copy_(outputs[1])

    def begin(self, order: Tensor) -> None:
        """Begin a pass in an order."""
        self.order.copy_(order)
        self.position.zero_()

    def next(self, *, with_images: bool = True) -> Batch:
        """Return the next batch, and move on by it."""
        index = self.order.index_select(0, self.position + self.within)
        self.position += self.batch_size
        images = self.images.index_select(0, index) if with_images else self.images[:0]
        images = (images * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        logits, features = (value.index_select(0, index).float() for value in (self.logits, self.features))
        return Batch(images, self.labels.index_select(0, index), logits, features, index)


class Students:
    """The joint network, its optimizer and one method per student.

    Args:
        model: see :func:`network`.
        methods: name -> method, on the device.
        source: where batches come from.
        rates: learning rate of every step of the whole training, (steps,).
    """

    def __init__(self, model: ResNet, methods: dict[str, Method], source: Data, rates: Tensor) -> None:
        self.model, self.methods, self.source, self.rates = model, methods, source, rates
        self.sgd = SGD(model.parameters())
        device = rates.device
        self.done = torch.zeros((), dtype=torch.int64, device=device)  # steps
        self.losses = torch.zeros(len(methods), device=device)  # sums over an epoch's steps
        cuda = device.type == "cuda"
        self.streams = [torch.cuda.Stream() for _ in methods] if cuda else []

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        own = list(self.model.state_dict().values())  # without what the dense form holds as a constant
        own += [tensor for each in self.methods.values() for tensor in (*each.parameters(), *each.buffers())]
        velocities = [tensor for each in (self, *self.methods.values()) for tensor in each.sgd.velocity]
        return [*own, *velocities, self.source.position, self.done, self.losses]

    def step(self, parallel: bool = False) -> None:
        """Train all students on the next batch, each loss on a stream of its own if ``parallel``."""
        batch, lr = self.source.next(), self.rates.index_select(0, self.done.view(1)).squeeze(0)
        with precision(self.rates.device.type):
            logits = self.model(batch.images)
        students = logits.detach().float().unflatten(1, (len(self.methods), -1)).unbind(1)
        found = []
        with self._branches(parallel) as branch:
            for number, (method, own) in enumerate(zip(self.methods.values(), students, strict=True)):
                with branch(number):
                    found.append(_updated(method, own, batch, lr))
        losses, gradients = zip(*found, strict=True)
        gradient = torch.cat(gradients, 1).to(logits.dtype)
        self.sgd.step(torch.autograd.grad(logits, self.sgd.parameters, gradient), lr)
        self.losses += torch.stack(losses)
        self.done += 1

    def guide_step(self, method: Method, losses: Tensor) -> None:
        """Train one method's guide on the next batch of what its student showed; add its loss to ``losses``."""
        lr = self.rates.index_select(0, (self.done - 1).clamp(min=0).view(1)).squeeze(0)
        loss = method.guide_loss(self.source.next(with_images=False))
        method.sgd.step(torch.autograd.grad(loss, method.sgd.parameters), lr)
        losses += loss.detach()

    def states(self) -> dict[str, State]:
        """Return each student's state."""
        return dict(zip(self.methods, parted(self.model.state_dict(), len(self.methods)), strict=True))

    @contextmanager
    def _branches(self, parallel: bool) -> Iterator[Callable[[int], AbstractContextManager[object]]]:
        """Streams that wait for what came before, and that what comes after waits for."""
        if not parallel:
            yield lambda number: nullcontext()
            return
        main = torch.cuda.current_stream()
        for stream in self.streams:
            stream.wait_stream(main)
        yield lambda number: torch.cuda.stream(self.streams[number])
        for stream in self.streams:
            main.wait_stream(stream)


def _updated(method: Method, own: Tensor, batch: Batch, lr: Tensor) -> tuple[Tensor, Tensor]:
    """Return a student's loss and its gradient by the logits; what the method trains has made its step."""
    own = own.clone(memory_format=torch.contiguous_format).requires_grad_()
    loss = method(own, batch)
    trained = method.trained()
    gradient, *others = torch.autograd.grad(loss, [own, *trained])
    if trained:
        method.sgd.step(others, lr)
    return loss.detach(), gradient
