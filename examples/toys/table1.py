"""Search, count and tabulate: what both problems of Table 1 share."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from .starts import PASSES, Problem, Starts, Trained, train

METHODS = ("CE", "KD", "DiSK")
RESULTS = Path(__file__).parents[1] / "results"
REPORT_SEED, SEARCH_SEEDS = 0, (100, 101)  # of data, teacher and starts
SEARCHED_STARTS = 25  # of each seed of the search

# A.1's ranges; "disk." is what it leaves open
RANGES: dict[str, dict[str, list[Any]]] = {
    "KD": {
        "ce_weight": [0.0, 0.1, 0.5, 0.9],
        "temperature": [1.0, 2.0, 4.0],
        "student_temperature": [1.0, 2.0, 4.0],
    },
    "DiSK": {
        "ce_weight": [0.0, 0.1, 0.5],
        "temperature": [1.0, 2.0, 4.0],
        "student_temperature": [1.0, 2.0, 4.0],
        "top_k": [1, 2],
        "multiplier_min": [0.01, 0.1, 1.0, 5.0, 10.0],
        "multiplier_max": [1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0],
        "budget": [0.0, 0.05, 0.1],
        "period": [20, 50],
        "disk.guide_lr": [0.01, 0.03, 0.1],
        "disk.hidden_dims": [(2,), (16, 16)],
        "disk.norm": ["layer", "batch"],
        "disk.guide_gradient_scale": [None, 0.3],
        "disk.inputs": ["both", "features"],
    },
}
# changes of DiSK's frozen settings that both problems are tried with; None leaves the problem as it is
OPEN_SETTINGS: dict[str, tuple[None, dict[str, Any]]] = {
    "guide reads logits alone": (None, {"disk.inputs": "logits"}),
    "guide's gradient as it is": (None, {"disk.guide_gradient_scale": None}),
    "guide with the other norm": (None, {"disk.norm": "other"}),
    "ce_weight .5": (None, {"ce_weight": 0.5}),
    "student_temperature as temperature": (None, {"student_temperature": None}),
    "paper's default schedule": (None, {"multiplier": (0.1, 50.0), "period": 50}),
    "budget .1": (None, {"budget": 0.1}),
}


class Toy(NamedTuple):
    """One problem of Table 1.

    Attributes:
        name: of its files.
        minima: names, the worst first, the global one last.
        paper: method -> the paper's counts of those minima that it names.
        make_student: builds a random start.
        make_problem: seed -> training data with the teacher's outputs.
        classify: students, their training data, its seed -> index into ``minima`` for each start (S,).
        trials: method -> settings to draw from, a list of values per name.
        iterations: R of Algorithm 1, times three passes over the data.
        batch_size: of a gradient step; None for all samples.
    """

    name: str
    minima: tuple[str, ...]
    paper: dict[str, dict[str, int]]
    make_student: Callable[[], nn.Module]
    make_problem: Callable[[int], Problem]
    classify: Callable[[Starts, Problem, int], Tensor]
    trials: dict[str, dict[str, list[Any]]]
    iterations: int
    batch_size: int | None


def run(
    toy: Toy, method: str, settings: dict[str, Any], *, starts: int, seed: int, iterations: int | None = None
) -> Trained:
    """Train ``starts`` students of one method on the problem of ``seed``."""
    own = dict(settings)
    disk = own.pop("disk", {})
    return train(
        toy.make_student,
        toy.make_problem(seed),
        method,
        own,
        starts=starts,
        iterations=iterations or toy.iterations,
        seed=seed,
        batch_size=toy.batch_size,
        disk=disk,
    )


def counts(toy: Toy, trained: Trained, seed: int) -> dict[str, int]:
    """Return how many starts ended in each minimum."""
    found = toy.classify(trained.students, toy.make_problem(seed), seed)
    return {name: int((found == index).sum()) for index, name in enumerate(toy.minima)}


def draw(toy: Toy, method: str, number: int) -> list[dict[str, Any]]:
    """Return ``number`` different settings drawn from the method's ranges, the same on every call."""
    rng, drawn = random.Random(0), []
    while len(drawn) < number:
        settings: dict[str, Any] = {}
        for name, values in toy.trials[method].items():
            value = rng.choice(values)
            if name.startswith("disk."):
                settings.setdefault("disk", {})[name.removeprefix("disk.")] = value
            else:
                settings[name] = value
        smallest, largest = settings.pop("multiplier_min", None), settings.pop("multiplier_max", None)
        if largest is not None:
            settings["multiplier"] = (min(smallest, largest), largest)
        if settings not in drawn:
            drawn.append(settings)
    return drawn


def search(toy: Toy, trials: int, starts: int) -> dict[str, Any]:
    """Try the same number of settings for KD and DiSK on data and starts that are never reported; keep the best."""
    found: dict[str, Any] = {"CE": {"settings": {}, "trials": 0}}
    for method in ("KD", "DiSK"):
        rows = []
        for settings in tqdm(draw(toy, method, trials), desc=f"{toy.name}: {method}"):
            ends = [counts(toy, run(toy, method, settings, starts=starts, seed=seed), seed) for seed in SEARCH_SEEDS]
            total = {name: sum(end[name] for end in ends) for name in toy.minima}
            rows.append({"settings": settings, "counts": total})
        # most in the global minimum; among equals, most in the next best
        best = max(rows, key=lambda row: [row["counts"][name] for name in reversed(toy.minima)])
        found[method] = {**best, "trials": trials, "rows": rows}
    return found


def report(toy: Toy, search: dict[str, Any], starts: int, iterations: int | None = None):
    """Train every method from the same starts with its frozen settings; return the results and what was trained."""
    trained = {}
    for method in tqdm(METHODS, desc=toy.name):
        settings = search[method]["settings"]
        trained[method] = run(toy, method, settings, starts=starts, seed=REPORT_SEED, iterations=iterations)
    results = {
        "counts": {method: counts(toy, trained[method], REPORT_SEED) for method in METHODS},
        "starts": starts,
        "passes": PASSES * (iterations or toy.iterations),
        "settings": {method: search[method]["settings"] for method in METHODS},
        "trials": {method: search[method]["trials"] for method in METHODS},
    }
    return results, trained


def ablate(toy: Toy, ablations: dict[str, tuple[Toy | None, dict[str, Any]]], search: dict[str, Any], starts: int):
    """Count ends under one change at a time, on the search's data and starts."""
    rows = {}
    for name, (changed, settings) in tqdm(ablations.items(), desc=toy.name):
        own = json.loads(json.dumps(search["DiSK"]["settings"]))
        for key, value in settings.items():
            if key.startswith("disk."):
                disk, key = own.setdefault("disk", {}), key.removeprefix("disk.")
                disk[key] = {"layer": "batch", "batch": "layer"}[disk["norm"]] if value == "other" else value
            else:
                own[key] = value
        # a change of DiSK's settings leaves CE and KD as they are
        methods = ("DiSK",) if settings else METHODS
        rows[name] = {}
        for method in methods:
            used = own if method == "DiSK" else search[method]["settings"]
            ends = [
                counts(changed or toy, run(changed or toy, method, used, starts=starts, seed=seed), seed)
                for seed in SEARCH_SEEDS
            ]
            rows[name][method] = {each: sum(end[each] for end in ends) for each in toy.minima}
    return {"starts": starts * len(SEARCH_SEEDS), "rows": rows}


def ablation_table(toy: Toy, results: dict[str, Any]) -> str:
    """Return the share of starts in each minimum, percent, under each change."""
    lines = [f"| change | {' | '.join(METHODS)} |", "|---|---|---|---|"]
    for name, row in results["rows"].items():
        cells = []
        for method in METHODS:
            shares = [f"{100 * count / results['starts']:.0f}" for count in row.get(method, {}).values()]
            cells.append(" / ".join(shares))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Percent of {results['starts']} starts in {' / '.join(toy.minima)}."])


def interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent."""
    low, high = stats.binomtest(count, total).proportion_ci(method="wilson")
    return 100 * low, 100 * high


def table(toy: Toy, results: dict[str, Any]) -> str:
    """Return counts with their 95 % intervals, the paper's beside them."""
    lines = [f"| method | {' | '.join(toy.minima)} |", f"|---|{'---|' * len(toy.minima)}"]
    for method, row in results["counts"].items():
        cells = []
        for name, count in row.items():
            low, high = interval(count, results["starts"])
            paper = toy.paper[method].get(name)
            beside = "" if paper is None else f"; paper {paper}"
            cells.append(f"{count} ({low:.0f} to {high:.0f}{beside})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    toy: Toy,
    ablations: dict[str, tuple[Toy | None, dict[str, Any]]],
    figures: Callable[[Toy, dict[str, Any], dict[str, Trained], Path], None],
    doc: str,
) -> None:
    """Parse the flags, search, ablate or report."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="few starts, few steps")
    parser.add_argument("--search", action="store_true", help="search the settings of KD and DiSK")
    parser.add_argument("--ablate", action="store_true", help="change one thing at a time")
    parser.add_argument("--trials", type=int, default=30, help="of the search, for each method")
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(f"runs/{toy.name}"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and with it a start on the edge, would depend on the number
    args.out.mkdir(parents=True, exist_ok=True)
    frozen = RESULTS / f"{toy.name}_search.json"
    if args.search:
        found = search(toy, 2 if args.dry_run else args.trials, 4 if args.dry_run else SEARCHED_STARTS)
        (args.out / frozen.name).write_text(json.dumps(found, indent=1) + "\n")
        print({method: (row["settings"], row.get("counts")) for method, row in found.items()})
        return
    if args.ablate:
        if args.dry_run:
            ablations = dict(list(ablations.items())[:1])
        results = ablate(toy, ablations, json.loads(frozen.read_text()), 2 if args.dry_run else SEARCHED_STARTS)
        (args.out / f"{toy.name}_ablation.json").write_text(json.dumps(results, indent=1) + "\n")
        print(ablation_table(toy, results))
        return
    starts, iterations = (6, 4) if args.dry_run else (args.starts, None)
    results, trained = report(toy, json.loads(frozen.read_text()), starts, iterations)
    print(table(toy, results))
    (args.out / f"{toy.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    figures(toy, results, trained, args.out)
