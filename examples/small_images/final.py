"""The report: each row and seed trains in its own folder, so that more can be added; a table of the finished ones."""

from typing import Any, NamedTuple

import torch

from .experiment import Experiment
from .methods import METHODS
from .report import better_kd, differences, machine, summary
from .resnet import State
from .training import Recipe, Run, finished_log
from .views import digest, error

THIRD = "kd, 1/3 of the passes"


class Row(NamedTuple):
    """A row of the table: its method, name in its folder, and number of epochs."""

    method: str
    settings: dict[str, Any]
    epochs: int
    name: str


class Final:
    """Rows and seeds of the report of one pair."""

    def __init__(self, experiment: Experiment, search: dict[str, Any]) -> None:
        self.experiment, self.args, self.search = experiment, experiment.args, search
        self._errors: dict[int, float] = {}  # of the seeds' warm starts
        chosen = experiment.chosen(search)
        self.rows = {name: Row(method, settings, self.args.epochs, name) for name, (method, settings) in chosen.items()}
        if self.args.third:
            self.rows[THIRD] = Row("kd", search["chosen"]["kd"]["settings"], self.args.epochs // 3, "kd")

    def train(self, seeds: list[int]) -> None:
        """Train what is missing of every row, from each seed's warm start."""
        experiment, together = self.experiment, self.args.side_by_side or 1
        for seed in seeds:
            start, _ = experiment.warm_start(seed, experiment.all, experiment.test)
            left = [label for label in self.rows if self.log(label, seed, start) is None]
            for epochs in dict.fromkeys(self.rows[label].epochs for label in left):
                names = [label for label in left if self.rows[label].epochs == epochs]
                for i in range(0, len(names), together):
                    self._fit(names[i : i + together], seed, start)

    def log(self, label: str, seed: int, start: State) -> list[dict[str, float]] | None:
        """Return the log of a finished row, trained alone or jointly, else None."""
        row, recipe = self.rows[label], self._recipe(label, seed)
        methods = self._methods([label], seed, start).values()
        expected = recipe.identity(methods, self.experiment.views, self.experiment.all, digest(start))
        folders = self.experiment.out.glob(f"{self._prefix(label, seed)}-*/checkpoint.pt")
        found = (finished_log(torch.load(path, weights_only=True), row.name, expected) for path in sorted(folders))
        return next((log for log in found if log), None)

    def collect(self) -> dict[str, Any]:
        """Return the test results of all finished rows and seeds, without training."""
        experiment, args = self.experiment, self.args
        logs: dict[str, dict[int, Any]] = {label: {} for label in self.rows}
        warm = {}
        for seed in range(args.seeds):
            run = experiment.warm_run(seed, experiment.all, experiment.test)
            if run.epoch < args.warm_epochs:
                continue
            start, warm[seed] = run.states()["ce"], run.logs["ce"][-1]["accuracy"]
            for label in self.rows:
                log = self.log(label, seed, start)
                if log:
                    logs[label][seed] = log
        logs = {label: runs for label, runs in logs.items() if runs}
        kd_rows = {label: runs for label, runs in logs.items() if self.rows[label][::2] == ("kd", args.epochs)}
        kd = better_kd(kd_rows)
        shared = ("student", "teacher", "epochs", "warm_epochs", "seeds", "views", "lr", "temperature")
        return {
            "protocol": {key: getattr(args, key) for key in shared}
            | {"machine": machine(args.device), "settings": {label: row.settings for label, row in self.rows.items()}},
            "teacher": experiment.teacher_accuracy["test"],
            "warm_start": list(warm.values()),
            "methods": {label: summary(runs, self._passes(label)) for label, runs in logs.items()},
            "kd": kd,
            "kd_rows": list(kd_rows),
            "differences": differences(logs, kd) | differences(logs, "uniform"),
            "logs": {label: list(runs.values()) for label, runs in logs.items()},
        }

    def _prefix(self, label: str, seed: int) -> str:
        return f"final-{self.args.student}-{self.rows[label].epochs}-seed{seed}"

    def _recipe(self, label: str, seed: int) -> Recipe:
        return self.experiment.recipe(self.args.student, self.rows[label].epochs, seed)

    def _methods(self, labels: list[str], seed: int, start: State) -> dict[str, Any]:
        chosen = {self.rows[label].name: (self.rows[label].method, self.rows[label].settings) for label in labels}
        if seed not in self._errors:
            self._errors[seed] = error(self.args.student, start, self.experiment.held_out)
        return self.experiment.methods(chosen, self.rows[labels[0]].epochs, seed, self._errors[seed])

    def _fit(self, labels: list[str], seed: int, start: State) -> None:
        experiment, methods = self.experiment, self._methods(labels, seed, start)
        folder = experiment.out / f"{self._prefix(labels[0], seed)}-{'-'.join(methods)}"
        recipe, every, test = self._recipe(labels[0], seed), experiment.all, experiment.test
        Run(recipe, methods, start, experiment.views, every, test, folder).fit()

    def _passes(self, label: str) -> dict[str, float]:
        """Return passes over the data: the student's training passes, and further forwards."""
        row = self.rows[label]
        return {"student": row.epochs, "extra_forwards": METHODS[row.method].extra_passes * row.epochs}
