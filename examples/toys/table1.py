"""Search, counts and ablations, shared by both problems of Table 1."""

import argparse
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from . import tables
from .rows import ROWS
from .starts import Problem, Starts
from .training import PASSES, Trained, train

Settings = dict[str, Any]  # of a row: see starts.train
RESULTS = Path(__file__).parents[1] / "results"
REPORT_SEEDS, SEARCH_SEEDS = (0, 1, 2, 3, 4), (100, 101)  # each with its own data, teacher and starts
SEARCHED_STARTS = 25  # per seed of search and ablation


class Toy(NamedTuple):
    """One problem of Table 1.

    Attributes:
        name: of its files.
        title: in the summary.
        minima: names, the worst first, the global one last.
        paper: row -> the paper's counts of those minima that it names.
        make_student: builds a random start.
        make_problem: seed -> training data with the teacher's outputs.
        classify: students, their training data, its seed -> index into ``minima`` for each start (S,).
        rows: row -> its settings, None if they are searched.
        trials: searched row -> settings to choose from.
        iterations: R of Algorithm 1, times three passes over the data; a row's own ``iterations`` take precedence.
        batch_size: of a gradient step; None for all samples.
        bounds: to which the students' parameters are clamped.
    """

    name: str
    title: str
    minima: tuple[str, ...]
    paper: dict[str, dict[str, int]]
    make_student: Callable[[], nn.Module]
    make_problem: Callable[[int], Problem]
    classify: Callable[[Starts, Problem, int], Tensor]
    rows: dict[str, Settings | None]
    trials: dict[str, list[Settings]]
    iterations: int
    batch_size: int | None
    bounds: tuple[float, float] | None = None


class Ablation(NamedTuple):
    """A problem, changes of settings (with the prefix "guide.": the guide's), and the rows to try them on."""

    toy: Toy
    changes: Settings
    rows: tuple[str, ...] = ROWS


class Study(NamedTuple):
    """A script's additions to its problem.

    Attributes:
        ablations: by name.
        describe: rows of the results, first seed's training results -> further results.
        remarks: results -> a table of them.
        figures: problem, results, first seed's training results, folder.
    """

    ablations: dict[str, Ablation]
    describe: Callable[[dict[str, Any], dict[str, Trained]], dict[str, Any]]
    remarks: Callable[[dict[str, Any]], str]
    figures: Callable[[Toy, dict[str, Any], dict[str, Trained], Path], None]


def run(toy: Toy, settings: Settings, *, starts: int, seed: int, dry_run: bool = False) -> Trained:
    """Train ``starts`` students of one row on the problem of ``seed``."""
    problem, iterations = toy.make_problem(seed), settings.get("iterations", toy.iterations)
    size = {"starts": starts, "iterations": 4 if dry_run else iterations}
    own = {"batch_size": toy.batch_size, "bounds": toy.bounds}
    return train(toy.make_student, problem, settings, seed=seed, **size, **own)


def counts(toy: Toy, trained: Trained, seed: int) -> list[int]:
    """Return the number of starts in each minimum."""
    found = toy.classify(trained.students, toy.make_problem(seed), seed)
    return torch.bincount(found, minlength=len(toy.minima)).tolist()


def total(toy: Toy, settings: Settings, starts: int, dry_run: bool = False) -> dict[str, int]:
    """Return the counts, summed over the seeds of the search."""
    ends = [counts(toy, run(toy, settings, starts=starts, seed=s, dry_run=dry_run), s) for s in SEARCH_SEEDS]
    return dict(zip(toy.minima, map(sum, zip(*ends, strict=True)), strict=True))


def draw(ranges: dict[str, list[Any]], number: int) -> list[Settings]:
    """Return ``number`` different settings drawn from ranges, the same on every call."""
    rng, drawn = random.Random(0), []
    while len(drawn) < number:
        values = {name: rng.choice(choices) for name, choices in ranges.items()}
        if "multiplier_max" in values:
            smallest, largest = values.pop("multiplier_min"), values.pop("multiplier_max")
            values = {"guide": {}, **values, "multiplier": [min(smallest, largest), largest]}
        settings = changed({}, values)
        if settings not in drawn:
            drawn.append(settings)
    return drawn


def changed(settings: Settings, changes: Settings) -> Settings:
    """Return settings with changes applied; "guide.lr" is the guide's lr."""
    own = copy.deepcopy(settings)
    for key, value in changes.items():
        place = own["guide"] if key.startswith("guide.") else own
        place[key.removeprefix("guide.")] = value
    return own


def search(toy: Toy, dry_run: bool = False) -> dict[str, Any]:
    """Try every setting of the searched rows on data and starts that are not reported; keep the best."""
    found: dict[str, Any] = {}
    for row, trials in toy.trials.items():
        rows = []
        for settings in tqdm(trials[:2] if dry_run else trials, desc=f"{toy.name}: {row}"):
            ends = total(toy, settings, 2 if dry_run else SEARCHED_STARTS, dry_run)
            rows.append({"settings": settings, "counts": ends})
        # most in the global minimum; ties: most in the next best
        best = max(rows, key=lambda each: [each["counts"][name] for name in reversed(toy.minima)])
        found[row] = {**best, "trials": len(rows), "rows": rows}
    return found


def settings_of(toy: Toy, searched: dict[str, Any]) -> dict[str, Settings]:
    """Return every row's settings, for searched rows the frozen ones."""
    return {row: searched[row]["settings"] if own is None else own for row, own in toy.rows.items()}


def interval(count: int, number: int) -> list[float]:
    """Return Wilson's 95 % interval of a share, in percent."""
    low, high = stats.binomtest(count, number).proportion_ci(method="wilson")
    return [100 * low, 100 * high]


def report(toy: Toy, searched: dict[str, Any], starts: int, dry_run: bool = False):
    """Train every row from the same starts of every seed; return the results and the first seed's training results."""
    rows, first = {}, {}
    for row, settings in settings_of(toy, searched).items():
        sets = []
        for seed in tqdm(REPORT_SEEDS[:1] if dry_run else REPORT_SEEDS, desc=f"{toy.name}: {row}"):
            trained = run(toy, settings, starts=starts, seed=seed, dry_run=dry_run)
            first.setdefault(row, trained)
            sets.append(counts(toy, trained, seed))
        pooled = list(map(sum, zip(*sets, strict=True)))
        rows[row] = {
            "settings": settings,
            "trials": searched[row]["trials"] if row in searched else None,
            "student_passes": PASSES * settings.get("iterations", toy.iterations),
            "counts": dict(zip(toy.minima, pooled, strict=True)),
            "interval_95": {name: interval(count, sum(pooled)) for name, count in zip(toy.minima, pooled, strict=True)},
            "per_set": sets,
        }
    return {"starts_per_set": starts, "sets": len(sets), "rows": rows}, first


def ablate(study: Study, searched: dict[str, Any], dry_run: bool = False) -> dict[str, Any]:
    """Count minima under one change at a time, on the search's data and starts."""
    starts, rows = 2 if dry_run else SEARCHED_STARTS, {}
    for name, (toy, changes, tried) in tqdm(list(study.ablations.items())[: 1 if dry_run else None]):
        own = settings_of(toy, searched)
        rows[name] = {row: total(toy, changed(own[row], changes), starts, dry_run) for row in tried}
    return {"starts": starts * len(SEARCH_SEEDS), "rows": rows}


def main(toy: Toy, study: Study, doc: str) -> None:
    """Parse the flags, search, ablate or report."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="few starts, few steps")
    parser.add_argument("--search", action="store_true", help="search the settings that are not given")
    parser.add_argument("--ablate", action="store_true", help="change one thing at a time")
    parser.add_argument("--starts", type=int, default=100, help="of each of the five sets")
    parser.add_argument("--out", type=Path, default=Path(f"runs/{toy.name}"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # else the order of sums, and so borderline starts, depends on the number of threads
    args.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, results: dict[str, Any]) -> None:
        (args.out / name).write_text(json.dumps(results, indent=1) + "\n")

    frozen = f"{toy.name}_search.json"
    if args.search:
        found = search(toy, args.dry_run)
        write(frozen, found)
        print({row: (best["settings"], best["counts"]) for row, best in found.items()})
        return
    searched = json.loads((RESULTS / frozen).read_text())
    if args.ablate:
        results = ablate(study, searched, args.dry_run)
        write(f"{toy.name}_ablation.json", results)
        print(tables.ablation(results))
        return
    results, trained = report(toy, searched, 6 if args.dry_run else args.starts, args.dry_run)
    results |= study.describe(results["rows"], trained)
    print(tables.counts(toy, results), study.remarks(results), sep="\n\n")
    write(f"{toy.name}.json", results)
    study.figures(toy, results, trained, args.out)
