"""Where DiSK helps: its default against the best of 36 settings of KD, with one g for all and a budget as controls.

Small problems, hundreds of students, warm-started with CE and from scratch. ``--choose`` compares the candidates for
the default by the rule in small_problems/candidates.py; without it the report is made, on other seeds and test data,
with only the temperature set, to the best for KD. Both store each finished cell and resume.

Usage: python examples/gain.py [--choose] [--data data/cifar100.npz --teacher TEACHER/checkpoint.pt] [--seeds N]
       [--only WORD ...] [--workers N] [--out DIR] [--dry-run]
"""

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from small_problems import candidates, pixels, report
from small_problems.candidates import Cell
from small_problems.problems import Problem
from small_problems.training import Scores, new_student, train_disk, train_kd, warm_student
from torch import nn
from tqdm import tqdm

SEARCH_SEEDS, REPORT_SEEDS = 100, 0  # the first seed of each


def arguments() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="compare the forms, on validation data")
    parser.add_argument("--data", type=Path, help="CIFAR-100, for the pixel problems; without it they are left out")
    parser.add_argument("--teacher", type=Path, help="checkpoint.pt of the ResNet10-l that cifar100.py trained")
    parser.add_argument("--seeds", type=int, help="students per method (3 to choose, 8 to report)")
    parser.add_argument("--only", nargs="+", help="cells whose name holds one of these")
    parser.add_argument("--workers", type=int, default=2, help="processes, a core each")
    parser.add_argument("--out", type=Path, default=Path("runs/gain"))
    parser.add_argument("--dry-run", action="store_true", help="two seeds, two passes, two cells")
    args = parser.parse_args()
    if (args.data is None) != (args.teacher is None):
        parser.error("--data and --teacher belong together: the pixel problems need both")
    args.workers = 1 if args.dry_run else args.workers
    args.seeds = args.seeds or (2 if args.dry_run else 3 if args.choose else 8)
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for an interval, got {args.seeds}")
    return args


def chosen_cells(args: argparse.Namespace) -> dict[str, Cell]:
    """Return the cells selected by the flags."""
    found = candidates.cells(args.out)
    if not args.choose:
        found |= candidates.new_cells()
    if args.data is None:
        found = {name: cell for name, cell in found.items() if "pixels" not in name}
    if args.only:
        found = {name: cell for name, cell in found.items() if any(word in name for word in args.only)}
    if args.dry_run:
        found = {name: cell._replace(warm=min(cell.warm, 1), passes=2) for name, cell in [*found.items()][:2]}
    return found


def run_cell(job: tuple[str, Cell, dict[str, Any], range, Path]) -> str:
    """Train what one cell lacks, store it and return the cell's name."""
    name, cell, forms, seeds, folder = job
    path = folder / f"{report.slug(name)}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("seeds") != [*seeds]:
        kept = {}
    missing = {form: settings for form, settings in forms.items() if form not in kept.get("rows", {})}
    if not missing:
        return name
    torch.set_num_threads(1)
    problem = cell.make()
    starts = [warm_student(problem, seed, cell.warm) if cell.warm else new_student(problem, seed) for seed in seeds]
    pairs = [*zip(starts, seeds, strict=True)]
    found = kept or best_kd(name, cell, problem, pairs)
    temperature = found["kd_settings"]["temperature"]
    for form, settings in missing.items():
        found["rows"][form] = _columns(
            [
                train_disk(problem, start, {"temperature": temperature, **settings}, seed, cell.passes)
                for start, seed in pairs
            ]
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return name


def best_kd(name: str, cell: Cell, problem: Problem, pairs: list[tuple[nn.Sequential, int]]) -> dict[str, Any]:
    """Train every trial of KD from every start; return the best by validation accuracy."""
    kd = [train_kd(problem, start, candidates.KD_TRIALS, seed, cell.passes) for start, seed in pairs]
    means = [sum(each[row].validation for each in kd) / len(pairs) for row in range(len(candidates.KD_TRIALS))]
    best = max(range(len(means)), key=means.__getitem__)
    return {
        "cell": name,
        "problem": problem.name,
        "seeds": [seed for _, seed in pairs],
        "teacher_test": problem.teacher_test,
        "kd_settings": candidates.KD_TRIALS[best],
        "kd_validation_means": means,
        "rows": {"KD": _columns([each[best] for each in kd])},
    }


def _columns(scores: list[Scores]) -> dict[str, list[float]]:
    return {name: [getattr(score, name) for score in scores] for name in Scores._fields}


def main() -> None:
    """Run the cells, print and write the table."""
    args = arguments()
    forms = candidates.FORMS if args.choose else candidates.REPORTED
    if args.dry_run:
        forms = dict([*forms.items()][:2])
    if args.data is not None:
        pixels.write(args.data, args.teacher, args.out)
    first = SEARCH_SEEDS if args.choose else REPORT_SEEDS
    name = "choice" if args.choose else "gain"
    folder = args.out / (f"{name}-dry" if args.dry_run else name)
    seeds = range(first, first + args.seeds)
    jobs = [(cell, settings, forms, seeds, folder) for cell, settings in chosen_cells(args).items()]
    with tqdm(total=len(jobs), desc="cells") as bar:
        if args.workers > 1:
            with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
                for _ in pool.imap_unordered(run_cell, jobs):
                    bar.update()
        else:
            for job in jobs:
                run_cell(job)
                bar.update()
    found = [json.loads((folder / f"{report.slug(cell)}.json").read_text()) for cell, *_ in jobs]
    shown = report.choice(found) if args.choose else report.gain(found)
    print(report.choice_table(shown) if args.choose else report.gain_table(shown))
    (args.out / ("gain_choice.json" if args.choose else "gain.json")).write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
