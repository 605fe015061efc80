"""Students trained jointly on the same batches, each with its own method; resumable after every epoch.

Initial weights, order of samples, augmentation, learning rate and number of passes are thus equal by construction, and
a batch is augmented once for all. The students are one joint network (see resnet.py), stepped by one SGD.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from disk_plugin.features import Outputs
from disk_plugin.features.method import BEFORE_LAST_MAP, LAST_MAP
from disk_plugin.training import guide_pass

from . import data
from .methods import Batch, Method
from .networks import network
from .resnet import State, joined, parted
from .views import Views, accuracies, batches, digest, precision, save

MOMENTUM, WEIGHT_DECAY, BATCH_SIZE = 0.9, 5e-4, 200
_NOISE_SEED = 555_555_555  # not a seed of any epoch's order
MAPS = (BEFORE_LAST_MAP, LAST_MAP)  # as networks show them
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.05),
}


class Recipe(NamedTuple):
    """Settings shared by all students of a run."""

    model: str
    epochs: int
    seed: int
    lr: float = 0.1
    batch_size: int = BATCH_SIZE
    device: str = "cpu"
    compiled: bool = False
    progress: bool = True
    num_classes: int = 100
    features: int | None = None  # of the student's bottleneck
    optimizer: str = "sgd"

    def network(self, copies: int = 1) -> nn.Module:
        """Build the student, or several as one."""
        return network(self.model, self.num_classes, copies, self.features)

    def identity(self, methods: Iterable[Method], views: Views, index: Tensor, start: str) -> list[Any]:
        """Return what identifies a checkpoint; ``start`` is the digest of the initial state."""
        same = self._asdict() | {"device": None, "compiled": None, "progress": None}
        teacher = digest(views.teacher.state_dict()) if views.teacher else None
        data_seen = [len(index), views.count, views.content, teacher]
        return json.loads(json.dumps([same, [repr(method) for method in methods], data_seen, start]))


class Run:
    """Students of one seed, one per method, trained jointly.

    Args:
        recipe: the shared settings.
        methods: name -> method.
        start: the initial state of all, or None for a fresh one of ``recipe.seed``.
        views: the training data.
        index: positions of the training split to train on.
        held_out: split to measure accuracy on after each epoch.
        folder: for ``checkpoint.pt`` after every epoch, from which a second call resumes; or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        methods: dict[str, Method],
        start: State | None,
        views: Views,
        index: Tensor,
        held_out: data.Split,
        folder: Path | None,
    ) -> None:
        self.recipe, self.methods, self.views, self.index, self.held_out = recipe, methods, views, index, held_out
        self.folder, self.epoch = folder, 0
        self.logs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
        torch.manual_seed(recipe.seed)
        start = recipe.network().state_dict() if start is None else start
        self.start = digest(start)
        self.identity = recipe.identity(methods.values(), views, index, self.start)  # a repr changes in training
        self.model = recipe.network(len(methods)).to(recipe.device, memory_format=torch.channels_last)
        self.model.load_state_dict(joined([start] * len(methods)))
        for method in methods.values():
            method.to(recipe.device)
        student = OPTIMIZERS[recipe.optimizer](self.model.parameters(), lr=recipe.lr)
        self.optimizers = [student, *(each for method in methods.values() for each in method.optimizers)]
        steps = recipe.epochs * -(-len(index) // recipe.batch_size)
        self.schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, steps) for each in self.optimizers]
        self.outputs = torch.compile(self.model.outputs) if recipe.compiled else self.model.outputs
        self.maps = any(method.reads_maps for method in methods.values())
        self._resume()

    def fit(self) -> "Run":
        """Train the remaining epochs."""
        bar = tqdm(
            total=self.recipe.epochs,
            initial=self.epoch,
            desc=self._label(),
            unit="epoch",
            disable=not self.recipe.progress,
        )
        with bar:
            while self.epoch < self.recipe.epochs:
                self.fit_epoch()
                best = max(self.logs, key=lambda name: self.logs[name][-1]["accuracy"])
                bar.set_postfix_str(f"best {best} {self.logs[best][-1]['accuracy']:.1f}")
                bar.update()
        return self

    def fit_epoch(self) -> None:
        """Train one epoch, log it and save it."""
        torch.manual_seed(_NOISE_SEED + 1_000_003 * self.recipe.seed + self.epoch)  # of noise, as in a resumed run
        self._guide_passes()
        self._log(self._student_pass())
        self.epoch += 1
        self._save()

    def accuracies(self, split: data.Split) -> list[float]:
        """Return each student's accuracy on a split, percent."""
        return accuracies(self.model, split, len(self.methods))

    def states(self) -> dict[str, State]:
        """Return each student's state."""
        return dict(zip(self.methods, parted(self.model.state_dict(), len(self.methods)), strict=True))

    def _label(self) -> str:
        return f"seed {self.recipe.seed}: {', '.join(self.methods)}"[:60]

    def _epoch_batches(self) -> Iterator[Batch]:
        recipe = self.recipe
        return batches(self.views, self.index, recipe.seed, self.epoch, recipe.batch_size)

    def _student_pass(self) -> Tensor:
        """One pass over the data for all; return each one's mean loss."""
        self.model.train()
        losses, count = torch.zeros(len(self.methods), device=self.recipe.device), 0
        for batch in self._epoch_batches():
            with precision(self.recipe.device):
                outputs = self.outputs(batch.images, self.maps)
            students = self._shown(*(each.float() for each in outputs))
            each = torch.stack(
                [
                    method(own if method.reads_student else own.logits, batch)
                    for method, own in zip(self.methods.values(), students, strict=True)
                ]
            )
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            each.sum().backward()  # each student's gradient is that of its own loss
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            losses, count = losses + each.detach(), count + 1
        return losses / count

    def _shown(self, *joint: Tensor) -> list[Outputs]:
        """Return each student's outputs out of the joint network's."""
        count = len(self.methods)
        parts = zip(*(value.unflatten(1, (count, -1)).unbind(1) for value in joint), strict=True)
        return [
            Outputs(logits, features, dict(zip(MAPS, maps, strict=False)), self.model.head(copy, count))
            for copy, (logits, features, *maps) in enumerate(parts)
        ]

    def _guide_passes(self) -> None:
        """Algorithm 1: before every third pass of the student, three of the guide with the student fixed."""
        due = {
            name: method
            for name, method in self.methods.items()
            if method.guide_passes and self.epoch % method.guide_passes == 0
        }
        if not due:
            return
        states = self.states()
        for name, method in due.items():
            student = self.recipe.network().to(self.recipe.device)
            student.load_state_dict(states[name])
            student.eval()
            for number in range(method.guide_passes):
                epoch = min(self.epoch + number, self.recipe.epochs - 1)
                part = batches(self.views, self.index, self.recipe.seed, epoch, self.recipe.batch_size)
                guide_pass(method.optimizer, part, partial(self._guide_loss, method, student))
            method.end_guide_passes()

    def _guide_loss(self, method: Method, student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), precision(self.recipe.device):
            logits = student(batch.images).float()
        return method.guide_loss(logits, batch)

    def _log(self, losses: Tensor) -> None:
        scores = self.accuracies(self.held_out)
        for (name, method), loss, score in zip(self.methods.items(), losses.tolist(), scores, strict=True):
            self.logs[name].append({"epoch": self.epoch, "loss": loss, "accuracy": score, **method.end_epoch()})

    def _save(self) -> None:
        if not self.folder:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": json.dumps(self.identity),
            "epoch": self.epoch,
            "logs": self.logs,
            "model": self.model.state_dict(),
            "methods": [method.state_dict() for method in self.methods.values()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }
        save(state, self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt" if self.folder else None
        if not path or not path.exists():
            return
        state, expected = torch.load(path, map_location=self.recipe.device, weights_only=True), self.identity
        if identity_in(state) != expected:
            raise RuntimeError(
                f"{path} holds a run with other settings; expected {expected}, got {identity_in(state)}: "
                f"remove it or choose another --out"
            )
        self.epoch, self.logs = state["epoch"], state["logs"]
        self.model.load_state_dict(state["model"])
        pairs = [(self.methods.values(), "methods"), (self.optimizers, "optimizers"), (self.schedulers, "schedulers")]
        for objects, key in pairs:
            for each, saved in zip(objects, state[key], strict=True):
                each.load_state_dict(saved)


def identity_in(checkpoint: dict[str, Any]) -> list[Any]:
    """Return a checkpoint's identity; a field missing in its recipe has the default."""
    recipe, *others = json.loads(checkpoint["settings"])
    return [Recipe._field_defaults | recipe, *others]


def finished_log(checkpoint: dict[str, Any], name: str, expected: list[Any]) -> list[dict[str, float]] | None:
    """Return the log of a method, or None if it is absent, has other settings or is unfinished.

    ``expected`` is its identity when trained alone; the checkpoint may hold further methods.
    """
    recipe, methods, *others = identity_in(checkpoint)
    if name not in checkpoint["logs"] or checkpoint["epoch"] < recipe["epochs"]:
        return None
    own = methods[list(checkpoint["logs"]).index(name)]
    return checkpoint["logs"][name] if [recipe, [own], *others] == expected else None
