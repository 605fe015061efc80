"""A training of students side by side that can be stopped after any epoch and goes on from there."""

import time
from typing import Any, NamedTuple

import torch
from small_images import data
from small_images.resnet import State
from small_images.training import MOMENTUM, WEIGHT_DECAY
from small_images.views import accuracies, digest
from torch import Tensor

from .graphs import recorded
from .methods import NUM_CLASSES, Method
from .sgd import cosine
from .store import Guard, Store
from .students import Data, Students, dense_is_faster, network
from .views import DeviceViews

_JUDGED_EVERY = 10  # epochs; also how often a state is kept


class Plan(NamedTuple):
    """What is equal for all students of a run."""

    model: str
    epochs: int
    seed: int
    batch_size: int = 200
    lr: float = 0.1
    recipe: tuple[float, float] = (MOMENTUM, WEIGHT_DECAY)


class Run:
    """Students from one start, one per method, trained side by side.

    Args:
        name: under which the store keeps its state.
        plan: what they share.
        methods: name -> method; moved to the views' device.
        start: the state that all begin with.
        views: the training data.
        test: what accuracy is measured on.
        ways: of making a step, see :func:`graphs.recorded`.

    Attributes:
        logs: per method, of each epoch.
        how: the way a step is made.
        seconds: that training took, all calls together.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        methods: dict[str, Method],
        start: State,
        views: DeviceViews,
        test: data.Split,
        store: Store,
        ways: tuple[str, ...],
    ) -> None:
        self.name, self.plan, self.views, self.test, self.store, self.ways = name, plan, views, test, store, ways
        labels, device = views.train.labels, views.train.labels.device
        self.taught = views.teacher is not None
        feature_dim = views.teacher.classifier.in_features if self.taught else 0
        size = views.train.images.shape[1:]
        self.source = Data(labels, size, feature_dim, NUM_CLASSES * self.taught, plan.batch_size)
        states = [start] * len(methods)
        # a CPU keeps the grouped form, which small_images found to be the faster one there
        self.dense = device.type == "cuda" and dense_is_faster(plan.model, states, plan.batch_size, device.type)
        model = network(plan.model, states, device.type, dense=self.dense)
        methods = {each: method.to(device) for each, method in methods.items()}
        self.students = Students(
            model, methods, self.source, cosine(plan.lr, plan.epochs * self.source.steps).to(device)
        )
        self.epoch, self.seconds, self.how = 0, 0.0, "none"
        self.logs: dict[str, list[dict[str, float]]] = {each: [] for each in methods}
        self._steps: dict[str, Any] = {}
        self.settings = {**plan._asdict(), "methods": list(methods), "views": views.count, "images": views.content}
        self.settings |= {"start": digest(start), "samples": len(labels)}
        self._resume()

    def fit(self, guard: Guard) -> bool:
        """Train what is left of the epochs, or until the guard says stop; return whether all is done."""
        while self.epoch < self.plan.epochs:
            if guard.over:
                self._keep()
                return False
            begin = time.perf_counter()
            self._epoch()
            self.seconds += time.perf_counter() - begin
            self.epoch += 1
            if self._judged(self.epoch):
                self._keep()
        return True

    def _judged(self, epoch: int) -> bool:
        return epoch % _JUDGED_EVERY == 0 or epoch == self.plan.epochs

    def _epoch(self) -> None:
        students, images = self.students, self.views(self.plan.seed, self.epoch)
        self.source.load(*images)
        self.source.begin(self._order(0))
        students.losses.zero_()
        students.model.train()
        self._pass("students", students.step, students.losses)
        losses = (students.losses / self.source.steps).tolist()
        judged = self._judged(self.epoch + 1)
        scores = accuracies(students.model, self.test, len(students.methods)) if judged else [None] * len(losses)
        for (name, method), loss, score in zip(students.methods.items(), losses, scores, strict=True):
            log = {"epoch": self.epoch + 1, "loss": loss, **method.end_epoch()}
            self.logs[name].append(log if score is None else {**log, "accuracy": score})
            if method.guide_passes and (self.epoch == 0 or (self.epoch + 1) % method.guide_passes == 0):
                self._guide_passes(name, method)

    def _guide_passes(self, name: str, method: Method) -> None:
        losses = torch.zeros((), device=self.students.losses.device)
        if name in self._steps:
            losses = self._steps[name][1]
        for number in range(method.guide_passes):
            self.source.begin(self._order(1 + number))
            self._pass(name, lambda parallel: self.students.guide_step(method, losses), losses)
        method.end_guide_passes()

    def _pass(self, name: str, step: Any, losses: Tensor) -> None:
        """Make a pass of steps, recorded the first time."""
        if name not in self._steps:
            make, how = recorded(step, [*self.students.state(), losses], losses, self.ways)
            self._steps[name] = make, losses
            self.how = how if name == "students" else self.how
        for _ in range(self.source.steps):
            self._steps[name][0]()

    def _order(self, number: int) -> Tensor:
        """The order of the epoch's pass ``number``: a function of seed and epoch alone."""
        generator = torch.Generator().manual_seed(1_000_003 * self.plan.seed + 10 * self.epoch + number)
        return torch.randperm(len(self.source.labels), generator=generator)

    def _keep(self) -> None:
        tensors = [tensor.detach().cpu() for tensor in self.students.state()]
        progress = [method.progress() for method in self.students.methods.values()]
        value = {"epoch": self.epoch, "seconds": self.seconds, "logs": self.logs, "tensors": tensors}
        self.store.put(self.name, self.settings, {**value, "progress": progress})

    @torch.no_grad()
    def _resume(self) -> None:
        value = self.store.get(self.name, self.settings)
        if value is None:
            return
        self.epoch, self.seconds, self.logs = value["epoch"], value["seconds"], value["logs"]
        for method, progress in zip(self.students.methods.values(), value["progress"], strict=True):
            method.set_progress(progress)
        for tensor, kept in zip(self.students.state(), value["tensors"], strict=True):
            tensor.copy_(kept)
