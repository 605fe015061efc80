"""For which CNNs does a scaffold help? Cheap runs over conditions: 16 px images, evaluated on held-out images."""

import re
import statistics
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import data, trials
from .experiment import SEARCH_SEED, Experiment
from .method import CE
from .methods import make_method
from .networks import width_of
from .paired import shown_difference
from .report import better_kd, differences, machine
from .shown import Shown
from .training import Recipe, Run
from .views import Views, outputs_of

PIXELS, JUDGED = 16, 5000  # side of the students' images; number of training images to measure accuracy on


class Condition(NamedTuple):
    """The differences from the plain pair; the teacher gets the images at full size."""

    student: str | None = None  # None: the flag's
    features: int | None = None  # width of the student's bottleneck
    superclasses: bool = False
    teacher: str | None = None
    corrected: bool = False  # correct the teacher's errors on training images
    share: float = 1.0  # of the training images
    times: int = 1  # factor of the number of epochs, the warm start's too
    compared: str = "default"  # a key of compared()'s


# most informative first: problems with a gain share a narrow readout and a much better teacher
CONDITIONS = {
    "8 features": Condition(features=8, compared="forms"),
    "as it is (16 features)": Condition(compared="forms"),
    "8 features, KD searched": Condition(features=8, compared="kd"),
    "as it is, KD searched": Condition(compared="kd"),
    "4 features": Condition(features=4),
    "wider body, 8 features": Condition(student="resnet10-s", features=8),
    "20 superclasses": Condition(superclasses=True),
    "8 features, Algorithm 1": Condition(features=8, compared="algorithm 1"),
    "a fifth of the images": Condition(share=0.2, times=3),
    "a teacher that is always right": Condition(corrected=True),
    "a weaker teacher": Condition(teacher="resnet10-s"),
    "as it is, Algorithm 1": Condition(compared="algorithm 1"),
    "4 features, cooler KD": Condition(features=4, compared="cooler"),
}


def compared(condition: Condition) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the methods compared under a condition: name -> (method, settings)."""
    at = {tau: trials.rows(tau) for tau in (1.0, 2.0)}
    if condition.compared == "kd":  # KD at six settings, the package's default form at two
        settings = [(tau, ce_weight) for tau in (1.0, 2.0, 4.0) for ce_weight in (0.0, 0.1)]
        kd = {
            f"kd-{tau:g}, ce_weight {ce_weight:g}": ("kd", {"ce_weight": ce_weight, "temperature": tau})
            for tau, ce_weight in settings
        }
        guided = {f"{row}-{tau:g}": at[tau][row] for row in ("uniform", "disk") for tau in at}
        return {"ce": ("ce", {}), **kd, **guided}
    if condition.compared == "cooler":  # where KD is best at temperature 1, the lowest tried
        cooler = {f"kd-{tau:g}": ("kd", {"ce_weight": 0.0, "temperature": tau}) for tau in (0.5, 0.7)}
        return {"kd-1": at[1.0]["kd-1"], **cooler, "disk-1": at[1.0]["disk"]}
    kd = {"kd-1": at[1.0]["kd-1"], "kd-2": ("kd", {"ce_weight": 0.1, "temperature": 2.0})}
    if condition.compared == "default":  # three settings each of KD and of DiSK
        more = {"kd-1, ce_weight 0.1": ("kd", {"ce_weight": 0.1, "temperature": 1.0})}
        return {
            **kd,
            **more,
            "uniform-1": at[1.0]["uniform"],
            "uniform-2": at[2.0]["uniform"],
            "disk-1": at[1.0]["disk"],
        }
    # the authors' zeroed target outside a fifth of the classes, with what the search of DiSK chose
    zeroed = {**trials.BEST, **trials.SMALL_K, "top_k": 20}
    if condition.compared == "algorithm 1":
        method, paper = at[1.0]["paper-replay"]
        cooler = {**paper, "loss": {**paper["loss"], "temperature": 2.0}}
        return {**kd, "paper-4": (method, paper), "paper-2": (method, cooler), "zeroed-replay-2": (method, zeroed)}
    held = {"kind": "uniform", "discount": 0.4}
    return {
        "ce": ("ce", {}),
        **kd,
        "auto-1": at[1.0]["uniform"],
        "auto-2": at[2.0]["uniform"],
        "held at .4-1": ("disk", {**at[1.0]["uniform"][1], "guide": held}),
        "constant .03-1": at[1.0]["uniform-constant"],
        "zeroed-2": ("disk", zeroed),
    }


class Cell:
    """One condition from one start: all its methods, trained jointly."""

    def __init__(self, experiment: Experiment, name: str, seed: int) -> None:
        self.experiment, self.args, self.seed = experiment, experiment.args, seed
        self.name, self.condition = name, CONDITIONS[name]
        self.epochs = self.args.epochs * self.condition.times
        self.network = self.condition.teacher or self.args.teacher
        self.index = data.part_of(experiment.searched, round(self.condition.share * len(experiment.searched)))
        words = re.findall("[a-z0-9]+", name.lower())
        self.folder = self._folder(f"condition-{'-'.join(words)}-{self._key(self.epochs)}")

    @cached_property
    def views(self) -> Shown:
        """What the students are shown, with the teacher's outputs; trains a teacher that is missing."""
        experiment = self.experiment
        teacher = experiment.teacher
        if self.network != self.args.teacher:
            teacher, _ = experiment.teacher_of(self.network)
        return self._shown(experiment.views_of(experiment.train, teacher), self.condition.corrected)

    @cached_property
    def held_out(self) -> data.Split:
        """The images that accuracy is reported on."""
        return self.views.split(self.experiment.held_out)

    @cached_property
    def judged(self) -> data.Split:
        """The training images that training accuracy is measured on."""
        return self.views.split(self.experiment.train.part(data.part_of(self.index, JUDGED)))

    def is_finished(self) -> bool:
        """Return whether all epochs of its methods are trained."""
        path = self.folder / "checkpoint.pt"
        return path.exists() and torch.load(path, weights_only=True)["epoch"] == self.epochs

    def run(self) -> dict[str, Any]:
        """Train what is missing; return accuracies on held-out and training images."""
        warm = self._warm_run().fit()
        accuracy = warm.logs["ce"][-1]["accuracy"]
        told = {"feature_dim": width_of(self.network), "epochs": self.epochs, "seed": self.seed}
        told |= {"budget": 1 - accuracy / 100, "num_classes": self._recipe(self.epochs).num_classes}
        chosen = compared(self.condition).items()
        methods = {name: make_method(method, settings, **told) for name, (method, settings) in chosen}
        start, recipe = warm.states()["ce"], self._recipe(self.epochs)
        run = Run(recipe, methods, start, self.views, self.index, self.held_out, self.folder).fit()
        train = dict(zip(methods, run.accuracies(self.judged), strict=True))
        return {
            "teacher": self._teacher(),
            "warm_start": {"held_out": accuracy, "train": warm.accuracies(self.judged)[0]},
            "methods": {
                name: {"held_out": log[-1]["accuracy"], "train": train[name], "last_epoch": log[-1]}
                for name, log in run.logs.items()
            },
        }

    def _shown(self, views: Views, corrected: bool) -> Shown:
        folder = self.experiment.out / f"images-{PIXELS}-{views.content}" if self.args.device != "cuda" else None
        return Shown(views, pixels=PIXELS, superclasses=self.condition.superclasses, corrected=corrected, folder=folder)

    def _recipe(self, epochs: int) -> Recipe:
        condition = self.condition
        recipe = self.experiment.recipe(condition.student or self.args.student, epochs, self.seed)
        return recipe._replace(num_classes=20 if condition.superclasses else 100, features=condition.features)

    def _key(self, epochs: int) -> str:
        """Return a key of student, data and length: conditions with the same key share a warm start."""
        recipe = self._recipe(epochs)
        shape = f"{recipe.model}-{recipe.features or 'all'}-{recipe.num_classes}"
        return f"{shape}-{len(self.index)}-{epochs}-seed{self.seed}"

    def _folder(self, name: str) -> Path:
        return self.experiment.out / name

    def _warm_run(self) -> Run:
        epochs = self.args.warm_epochs * self.condition.times
        views = self._shown(Views(self.experiment.train, self.args.views, None, None), corrected=False)
        folder = self._folder(f"condition-warm-{self._key(epochs)}")
        return Run(self._recipe(epochs), {"ce": CE()}, None, views, self.index, self.held_out, folder)

    def _teacher(self) -> dict[str, float]:
        """Return the teacher's accuracy on full-size images, percent, over the condition's classes."""
        experiment, found = self.experiment, {}
        part = data.part_of(self.index, JUDGED)
        for name, split in {"held_out": experiment.held_out, "train": experiment.train.part(part)}.items():
            logits, _ = outputs_of(self.views.teacher, split.images)
            corrected = split.labels if name == "train" else None
            right = self.views.logits(logits, corrected).argmax(1) == self.views.split(split).labels
            found[name] = 100 * right.float().mean().item()
        return found


def conditions(
    experiment: Experiment,
    only: list[int] | None,
    keep: Callable[[dict[str, Any]], None],
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train all conditions from the first start, then from the next; report the results after every cell.

    With ``only`` it trains those alone, and reports what has finished of the others too. ``earlier`` results are part
    of the report, and are not trained again.

    Raises:
        ValueError: the earlier results are of another protocol, or compare other methods.
    """
    args = experiment.args
    shared = ("student", "teacher", "epochs", "warm_epochs", "views", "lr")
    protocol = {key: getattr(args, key) for key in shared} | {"pixels": PIXELS, "machine": machine(args.device)}
    cells = cells_of(earlier, protocol) if earlier else {name: {} for name in CONDITIONS}
    found = {"protocol": protocol, "conditions": grouped(cells)}
    for seed in range(SEARCH_SEED, SEARCH_SEED + args.seeds):
        for number, name in enumerate(CONDITIONS):
            cell = Cell(experiment, name, seed)
            if seed not in cells[name] and (only is None or number in only or cell.is_finished()):
                cells[name][seed] = cell.run()
                found["conditions"] = grouped(cells)
                keep(found)
    return found


def cells_of(earlier: dict[str, Any], protocol: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Return the cells of earlier results, by condition and seed; add its machine to ``protocol``."""
    same = {key: value for key, value in earlier["protocol"].items() if key != "machine"}
    if same != {key: value for key, value in protocol.items() if key != "machine"}:
        raise ValueError(
            f"expected earlier results of the protocol {protocol}, got {earlier['protocol']}; use another --out"
        )
    protocol["machine"] = "; ".join(dict.fromkeys([*earlier["protocol"]["machine"].split("; "), protocol["machine"]]))
    cells: dict[str, dict[int, Any]] = {name: {} for name in CONDITIONS}
    for name, condition in earlier["conditions"].items():
        methods = list(compared(CONDITIONS[name])) if name in CONDITIONS else None
        for seed, cell in zip(condition["seeds"], condition["cells"], strict=True):
            if list(cell["methods"]) != methods:
                raise ValueError(f"expected earlier results of {name!r} with {methods}, got {list(cell['methods'])}")
            cells[name][seed] = cell
    return cells


def grouped(cells: dict[str, dict[int, Any]]) -> dict[str, Any]:
    """Return each condition that has cells, in order of seeds."""
    return {name: summed(dict(sorted(each.items()))) for name, each in cells.items() if each}


def summed(cells: dict[int, Any]) -> dict[str, Any]:
    """Return the cells of a condition by method, with paired differences to the better KD."""
    names = next(iter(cells.values()))["methods"]
    logs = {
        name: {seed: [{"accuracy": cell["methods"][name]["held_out"]}] for seed, cell in cells.items()}
        for name in names
    }
    kd = better_kd({name: runs for name, runs in logs.items() if name.startswith("kd")})
    return {"seeds": list(cells), "cells": list(cells.values()), "kd": kd, "differences": differences(logs, kd)}


def conditions_table(results: dict[str, Any]) -> str:
    """Return the conditions as Markdown, a table for each set of methods compared."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, condition in results["conditions"].items():
        methods = tuple(method for method in condition["cells"][0]["methods"] if not method.startswith("kd"))
        groups.setdefault(methods, {})[name] = condition
    return "\n\n".join(_table(methods, group) for methods, group in groups.items())


def _table(methods: tuple[str, ...], group: dict[str, Any]) -> str:
    """Return conditions that compare the same methods; accuracies are held-out (training)."""
    columns = ["condition", "teacher", "warm start", "better KD", *(f"{method} minus KD" for method in methods)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, condition in group.items():
        cells, kd = condition["cells"], condition["kd"]
        row = [_accuracies([cell[key] for cell in cells]) for key in ("teacher", "warm_start")]
        row.append(f"{_accuracies([cell['methods'][kd] for cell in cells])}, {kd}")
        gaps = [condition["differences"][f"{method} - {kd}"] for method in methods]
        lines.append(f"| {' | '.join([name, *row, *map(_difference, gaps)])} |")
    if len(group) == 1:
        return "\n".join(lines)
    means = [
        statistics.fmean(
            gap for each in group.values() for gap in each["differences"][f"{method} - {each['kd']}"]["values"]
        )
        for method in methods
    ]
    lines.append(f"| mean |  |  |  | {' | '.join(f'{mean:+.2f}' for mean in means)} |")
    return "\n".join(lines)


def _accuracies(each: list[dict[str, float]]) -> str:
    held_out, train = (statistics.fmean(one[split] for one in each) for split in ("held_out", "train"))
    return f"{held_out:.1f} ({train:.1f})"


def _difference(gap: dict[str, Any]) -> str:
    """Return a mean with its interval, or, of one or two seeds, each value."""
    if len(gap["values"]) > 2:
        return shown_difference(gap)
    return " / ".join(f"{value:+.2f}" for value in gap["values"])
