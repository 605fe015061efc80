"""Does DiSK help here? CE, KD and DiSK students on scikit-learn's digits, twice, in under two minutes on a CPU.

With shifts by one pixel capacity limits a student of four units. Without them it fits most of what the teacher fits,
and overfits. Every student starts from a CE-trained one and makes the same number of passes over the same batches, with
the same optimizer; DiSK is README's loop, UniformGuide the same without a network. KD, DiSK and UniformGuide had 36
settings each, selected on validation data of other seeds (``--search``, frozen in results/quickstart_search.json); test
data is read once, after training.

Usage: python examples/quickstart.py [--dry-run] [--search] [--seeds N] [--out DIR]
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from small_problems import problems, shown
from small_problems.candidates import KD_TRIALS
from small_problems.problems import Problem, accuracy
from small_problems.report import difference
from small_problems.stacked import KD, CrossEntropy, train_seeds
from small_problems.training import make_disk, new_student, train_kd
from torch import nn
from tqdm import tqdm

from disk_plugin.diagnostics import capacity_gap

SEARCH_FILE = Path(__file__).parent / "results" / "quickstart_search.json"
SEARCH_SEEDS = [100, 101, 102, 103]  # never those of the report
SEARCHED = ("KD", "DiSK", "UniformGuide")
UNTUNED = "DiSK, KD's temperature"  # README's loop, nothing else set
METHODS = ("CE", "KD", "DiSK", UNTUNED, "UniformGuide")
COMPARED = [("CE", "KD"), ("DiSK", "KD"), (UNTUNED, "KD"), ("UniformGuide", "KD"), ("DiSK", "UniformGuide")]

TARGETS: list[dict[str, Any]] = [
    *({"discount": "auto", "share": share, "over": over} for share, over in ((0.8, 0.2), (1.0, 0.3), (0.5, 0.2))),
    *({"discount": discount} for discount in (0.1, 0.2, 0.4)),
]
DISK_TRIALS = [
    {"ce_weight": ce_weight, "temperature": temperature, **target}
    for ce_weight, temperature, target in itertools.product((0.0, 0.1), (1.0, 2.0, 4.0), TARGETS)
]
TRIALS = {"KD": KD_TRIALS, "DiSK": DISK_TRIALS, "UniformGuide": DISK_TRIALS}


class Setup(NamedTuple):
    """A problem and its students' number of epochs; views: copies of each image in the training data."""

    make: Callable[[], Problem]
    warm: int
    passes: int
    batch_size: int
    views: int = 1


SETUPS = {
    "digits, shifted": Setup(problems.shifted_digits, warm=12, passes=12, batch_size=200, views=9),
    "digits": Setup(problems.digits, warm=30, passes=40, batch_size=100),
}


def prepare(setup: Setup, seeds: list[int]) -> tuple[Problem, list[nn.Module]]:
    """Return the problem with its teacher, and a CE-trained student per seed."""
    problem = setup.make()._replace(batch_size=setup.batch_size)
    cold = [new_student(problem, seed) for seed in seeds]
    return problem, train_seeds(problem, cold, [CrossEntropy() for _ in seeds], seeds, setup.warm)


def settings_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every method's settings, searched ones as the search found them."""
    searched = {method: found[method]["settings"] for method in SEARCHED}
    return {"CE": {}, **searched, UNTUNED: {"temperature": searched["KD"]["temperature"]}}


def uniform(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with one g for all samples instead of a guide."""
    others = {name: value for name, value in settings.items() if name != "discount"}
    return {"uniform": {"discount": settings.get("discount", "auto")}, **others}


def make_losses(problem: Problem, method: str, settings: dict[str, Any], seeds: list[int]) -> list[nn.Module]:
    """Return a method's loss for each seed."""
    losses: list[nn.Module] = []
    for seed in seeds:
        torch.manual_seed(seed)  # of the guide's weights
        if method == "CE":
            losses.append(CrossEntropy())
        elif method == "KD":
            losses.append(KD(**settings))
        else:
            losses.append(make_disk(problem, uniform(settings) if method == "UniformGuide" else settings))
    return losses


def search(name: str, setup: Setup) -> dict[str, Any]:
    """Select each method's settings by mean validation accuracy at the last epoch."""
    problem, starts = prepare(setup, SEARCH_SEEDS)
    chosen = {}
    with tqdm(total=sum(map(len, TRIALS.values())), desc=f"search, {name}") as bar:
        for method in SEARCHED:
            if method == "KD":
                pairs = zip(starts, SEARCH_SEEDS, strict=True)
                every = [train_kd(problem, start, KD_TRIALS, seed, setup.passes) for start, seed in pairs]
                scores = [[seed[row].validation for seed in every] for row in range(len(KD_TRIALS))]
                bar.update(len(KD_TRIALS))
            else:
                scores = []
                for settings in TRIALS[method]:
                    losses = make_losses(problem, method, settings, SEARCH_SEEDS)
                    students = train_seeds(problem, starts, losses, SEARCH_SEEDS, setup.passes)
                    scores.append(scored(students, problem.validation))
                    bar.update()
            means = [sum(each) / len(each) for each in scores]
            best = max(range(len(means)), key=means.__getitem__)
            chosen[method] = {"trials": len(means), "settings": TRIALS[method][best], "validation": means}
    return chosen


@torch.no_grad()
def scored(students: list[nn.Module], split: problems.Split) -> list[float]:
    """Return each student's accuracy on the split, percent."""
    return [accuracy(student(split.x), split.y) for student in students]


def compare(
    name: str, setup: Setup, found: dict[str, Any], seeds: list[int], bar: tqdm
) -> tuple[dict[str, Any], shown.Seen]:
    """Train every method from every seed; return the numbers, and the figure's data on DiSK's guide."""
    problem, starts = prepare(setup, seeds)
    settings = settings_of(found)
    rows: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        losses = make_losses(problem, method, settings[method], seeds)
        watch = shown.Watch(problem, losses[: shown.WATCHED] if method == "DiSK" else [])
        students = train_seeds(problem, starts, losses, seeds, setup.passes, watch)
        test = scored(students, problem.test)
        rows[method] = {
            "settings": settings[method],
            "test": test,
            "mean": sum(test) / len(seeds),
            "extra_parameters": sum(parameter.numel() for parameter in losses[0].parameters()),
        }
        if method == "DiSK":
            seen = watch.end(students[0], setup.views)
        bar.update()
    differences = {f"{one} - {other}": difference(rows[one], rows[other], "test") for one, other in COMPARED}
    numbers = {
        "data": {split: len(getattr(problem, split).y) for split in ("train", "validation", "test")},
        "passes": {"warm": setup.warm, "student": setup.passes},
        "teacher_test": problem.teacher_test,
        "methods": rows,
        "differences": differences,
        "guide": seen.curves,
        "verdict": verdict(name, differences),
        "capacity_gap": recommended(problem, starts[0]),
    }
    return numbers, seen


def recommended(problem: Problem, student: nn.Module) -> dict[str, Any]:
    """Return ``capacity_gap``'s recommendation for a warm-started student; validation data are held out."""
    gap = capacity_gap(student, problem.teacher, [problem.train], [problem.validation])
    return {name: getattr(gap, name) for name in ("by_capacity", "by_data", "verdict", "recommendation")}


def verdict(name: str, differences: dict[str, Any]) -> str:
    """Return one sentence on what the intervals show: is DiSK ahead of KD, and does its network matter?"""
    said = {
        "DiSK - KD": ("DiSK is ahead of KD", "DiSK is behind KD", "DiSK and KD cannot be told apart"),
        "DiSK - UniformGuide": (
            "the guide network adds to it",
            "the guide network costs",
            "the guide network adds nothing that can be told",
        ),
    }
    parts = []
    for pair, (ahead, behind, neither) in said.items():
        low, high = differences[pair]["interval_95"]
        parts.append(f"{ahead if low > 0 else behind if high < 0 else neither}, {interval(differences[pair])}")
    problem = name.replace(", shifted", " under shifts")
    return f"On the {problem} {parts[0]}; beside one g for all samples {parts[1]}."


def interval(found: dict[str, Any]) -> str:
    """Show a difference with its interval."""
    low, high = found["interval_95"]
    return f"{found['mean']:+.2f} ({low:+.2f} to {high:+.2f})"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, with the verdicts and recommendations below."""
    lines = [
        "| problem | method | test accuracy | minus KD, paired (95 % interval) | settings | extra parameters |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results["problems"].items():
        for method, row in found["methods"].items():
            minus = found["differences"].get(f"{method} - KD")
            settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
            lines.append(
                f"| {name} | {method} | {row['mean']:.2f} | {interval(minus) if minus else ''} | {settings} | "
                f"{row['extra_parameters']:,} |"
            )
    lines.append("")
    for found in results["problems"].values():
        gap = found["capacity_gap"]
        lines += [
            f"{found['verdict']} `capacity_gap`, asked before: gap by capacity {100 * gap['by_capacity']:+.1f} points, "
            f"by data {100 * gap['by_data']:+.1f}; {gap['recommendation']}.",
            "",
        ]
    teachers = " and ".join(f"{found['teacher_test']:.1f}" for found in results["problems"].values())
    lines.append(f"{results['seeds']} seeds; teachers {teachers}.")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="two passes and two seeds, to see it run")
    parser.add_argument("--search", action="store_true", help=f"search the settings again and write {SEARCH_FILE.name}")
    parser.add_argument("--seeds", type=int, help="students per method, at least 2 (default 20)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for quickstart.json and .png")
    args = parser.parse_args()
    args.seeds = (2 if args.dry_run else 20) if args.seeds is None else args.seeds
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for an interval, got {args.seeds}")
    if args.seeds > SEARCH_SEEDS[0]:
        parser.error(f"--seeds must be at most {SEARCH_SEEDS[0]}, where those of the search begin, got {args.seeds}")
    if args.search and args.dry_run:
        parser.error("--search writes the settings of the report: not with --dry-run")
    return args


def main() -> None:
    """Search if asked to, train, print and write."""
    args = arguments()
    torch.set_num_threads(1)  # faster for matrices this small, and reproducible on any number of cores
    if args.search:
        SEARCH_FILE.write_text(
            json.dumps({name: search(name, setup) for name, setup in SETUPS.items()}, indent=1) + "\n"
        )
    found = json.loads(SEARCH_FILE.read_text())
    setups = {name: setup._replace(warm=2, passes=2) for name, setup in SETUPS.items()} if args.dry_run else SETUPS
    results: dict[str, Any] = {"seeds": args.seeds, "problems": {}}
    seen = {}
    with tqdm(total=len(setups) * len(METHODS), desc="methods") as bar:
        for name, setup in setups.items():
            results["problems"][name], seen[name] = compare(name, setup, found[name], [*range(args.seeds)], bar)
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quickstart.json").write_text(json.dumps(results, indent=1) + "\n")
    shown.figure(results, seen).savefig(args.out / "quickstart.png", dpi=110)
    print(f"wrote {args.out / 'quickstart.json'} and {args.out / 'quickstart.png'}")


if __name__ == "__main__":
    main()
