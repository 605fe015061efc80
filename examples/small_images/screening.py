"""When the guide helps: the best trials from further starts, and regimes in which a scaffold might matter."""

from collections import Counter
from typing import Any

import torch

from . import trials
from .data import Split, flip, part_of
from .experiment import SEARCH_SEED, Experiment
from .methods import CE, METHODS
from .report import differences, machine, summary
from .training import Run
from .views import Views

SEEDS = (SEARCH_SEED, SEARCH_SEED + 1, SEARCH_SEED + 2)  # none is one of the report's
FRESH = SEEDS[1:]  # nothing was selected on them
WITHIN = 1.0  # percentage points of the best


def close_to_best(rows: dict[str, dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Choose KD's best, DiSK's trials within a point of its best, and both alternations."""
    kd = max((name for name in rows if rows[name]["method"] == "kd"), key=lambda name: rows[name]["accuracy"])
    best = max(row["accuracy"] for row in rows.values() if row["method"] != "kd")
    close = [
        name
        for name, row in rows.items()
        if row["method"] != "kd" and (row["accuracy"] >= best - WITHIN or name in trials.REPEATED)
    ]
    return {name: (rows[name]["method"], rows[name]["settings"]) for name in [kd, *close]}


def repeated(experiment: Experiment, rows: dict[str, dict[str, Any]], only: list[int] | None) -> dict[str, Any] | None:
    """Train the trials close to the best from two more starts; return their means and paired differences to KD.

    The start used for selection is reported separately: the best of many is biased upward there.
    """
    chosen = close_to_best(rows)
    found = {
        seed: experiment.tried(chosen, f"repeat-seed{seed}", seed=seed)
        for number, seed in enumerate(FRESH)
        if only is None or number in only
    }
    if only is not None:
        return None
    logs = {name: [found[seed]["rows"][name]["log"] for seed in FRESH] for name in chosen}
    kd = next(iter(chosen))
    named = {"kd" if name == kd else name: log for name, log in logs.items()}
    protocol = {**found[FRESH[0]]["protocol"], "seed": FRESH, "trials": Counter(row["method"] for row in rows.values())}
    when_chosen = {"kd" if name == kd else name: rows[name]["accuracy"] for name in chosen}
    method_of = {"kd": "kd"} | {name: method for name, (method, _) in chosen.items()}
    compared = _compared(named, protocol["epochs"], method_of)
    return {"protocol": protocol, "settings": chosen, "when_chosen": when_chosen, **compared}


def regimes(experiment: Experiment, search: dict[str, Any], only: list[int] | None) -> dict[str, Any] | None:
    """Compare CE, KD and DiSK with their frozen settings in each regime, on the held-out images."""
    found: dict[str, Any] = {}
    for number, (name, regime) in enumerate(trials.REGIMES.items()):
        if only is not None and number not in only:
            continue
        logs: dict[str, list[Any]] = {}
        for seed in SEEDS[: experiment.args.seeds]:
            for method, log in _in_regime(experiment, search, regime, seed).items():
                logs.setdefault(method, []).append(log)
        method_of = {name: method for name, (method, _) in experiment.chosen(search).items()}
        found[name] = {"regime": regime._asdict(), **_compared(logs, regime.epochs, method_of)}
    seeds = SEEDS[: experiment.args.seeds]
    protocol = {"student": experiment.args.student, "teacher": experiment.args.teacher, "seeds": seeds}
    machine_used = machine(experiment.args.device)
    return None if only is not None else {"protocol": {**protocol, "machine": machine_used}, "regimes": found}


def _in_regime(experiment: Experiment, search: dict[str, Any], regime: trials.Regime, seed: int) -> dict[str, Any]:
    """Train all methods of a seed jointly; return their logs."""
    args = experiment.args
    index = part_of(experiment.searched, regime.images or len(experiment.searched))
    images, labels = experiment.train.part(index)
    train = Split(images, flip(labels.cpu(), regime.wrong_labels)[0].to(labels.device))
    views, every = experiment.views_of(train), torch.arange(len(index))
    name = "-".join(str(value) for value in regime)
    start = None
    if regime.warm_epochs:
        plain = Views(train, args.views, None, None)
        recipe = experiment.recipe(args.student, regime.warm_epochs, seed)
        folder = experiment.out / f"regime-warm-{args.student}-{name}-seed{seed}"
        start = Run(recipe, {"ce": CE()}, None, plain, every, experiment.held_out, folder).fit().states()["ce"]
    methods = experiment.methods(experiment.chosen(search), regime.epochs, seed, search["budget"])
    recipe = experiment.recipe(args.student, regime.epochs, seed)
    folder = experiment.out / f"regime-{args.student}-{name}-seed{seed}"
    return Run(recipe, methods, start, views, every, experiment.held_out, folder).fit().logs


def _compared(logs: dict[str, list[Any]], epochs: int, method_of: dict[str, str]) -> dict[str, Any]:
    methods, by_seed = {}, {name: dict(enumerate(runs)) for name, runs in logs.items()}
    for name, runs in by_seed.items():
        extra = METHODS[method_of[name]].extra_passes
        methods[name] = summary(runs, {"student": epochs, "extra_forwards": extra * epochs})
    return {"methods": methods, "differences": differences(by_seed, "kd"), "logs": logs}
