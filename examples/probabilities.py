"""What are DiSK's probabilities worth? Its students beside KD's on problems of gain.py and of uneven classes.

Repeats gain.py's students, with its seeds, starts, passes and settings of KD, and measures more than their accuracy:
balanced accuracy, negative log-likelihood, overconfidence, and the likelihood after one temperature fitted on
validation data. The problems of uneven classes are not gain.py's: KD's setting is chosen for them in the same way.
A last row asks whether a guide whose objective makes s + g a distribution does better. What ``--out`` lacks is trained.

Usage: python examples/probabilities.py [--seeds N] [--out DIR] [--dry-run]
"""

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gain import best_kd
from scipy.optimize import minimize_scalar
from sklearn.metrics import balanced_accuracy_score, recall_score
from small_problems import candidates, problems
from small_problems.candidates import Cell
from small_problems.problems import Problem, Split, accuracy
from small_problems.report import difference
from small_problems.training import disk_student, kd_students, warm_student
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
LIMITED = (  # by capacity
    "scaffold_target 12, warm, 24 passes",
    "digits shifted, warm, 12 passes",
    "clusters (new), warm, 10 passes",
)
WIDTHS = (5, 16)  # with 5 units even KD finds hardly any sample of the rarer half of the classes
UNEVEN = {f"uneven clusters {width} (new), warm, 10 passes": width for width in WIDTHS}
CELLS = (*LIMITED, *UNEVEN, "digits, warm, 30 passes")
DISK, UNIFORM, NORMALIZED = "DiSK, default", "UniformGuide, discount auto", "normalized guide"
METHODS = {**{name: candidates.REPORTED[name] for name in (DISK, UNIFORM)}, NORMALIZED: {"normalized": True}}
MEASURES = {
    "accuracy": "accuracy, %",
    "balanced": "balanced accuracy, %",
    "nll": "NLL, nats",
    "overconfidence": "overconfidence, points",
    "nll_fitted": "NLL after a fitted temperature",
}
QUARTERS = ("most frequent quarter", "second quarter", "third quarter", "rarest quarter")  # of the classes
TEMPERATURES = 0.05, 20.0  # within which one is fitted
DECIMALS = 5  # of what is stored


def chosen_cells() -> dict[str, Cell]:
    """Return the cells by name."""
    found = candidates.cells(Path()) | candidates.new_cells()
    found |= {name: Cell(partial(problems.uneven_clusters, width), 10, 10) for name, width in UNEVEN.items()}
    return {name: found[name] for name in CELLS}


def nll(logits: Tensor, y: Tensor, temperature: float = 1.0) -> float:
    """Return the negative log-likelihood of the labels, nats per sample."""
    return F.cross_entropy(logits.double() / temperature, y).item()


def fitted_temperature(logits: Tensor, y: Tensor) -> float:
    """Return the temperature by which the logits are to be divided for the least negative log-likelihood."""
    bounds = [math.log(bound) for bound in TEMPERATURES]
    found = minimize_scalar(lambda log: nll(logits, y, math.exp(log)), bounds=bounds, method="bounded")
    return math.exp(found.x)


def measures(logits: Tensor, y: Tensor, temperature: float) -> dict[str, float]:
    """Return all of ``MEASURES`` on test data; ``temperature`` is that fitted on validation data."""
    predicted, right = logits.argmax(1), accuracy(logits, y)
    return {
        "accuracy": right,
        "balanced": 100 * float(balanced_accuracy_score(y, predicted)),
        "nll": nll(logits, y),
        "overconfidence": 100 * logits.double().softmax(1).amax(1).mean().item() - right,
        "nll_fitted": nll(logits, y, temperature),
    }


@torch.no_grad()
def look(student: nn.Module, problem: Problem) -> dict[str, float]:
    """Return a student's measures, its fitted temperature and its recall by quarters of the classes."""

    def shown(split: Split) -> tuple[Tensor, Tensor]:
        logits = student(split.x)
        return (logits[0] if logits.dim() == 3 else logits), split.y  # a stack holds one student here

    temperature = fitted_temperature(*shown(problem.validation))
    logits, y = shown(problem.test)
    quarters = recall_by_quarters(logits.argmax(1), y, torch.bincount(problem.train.y))
    return {**measures(logits, y, temperature), "temperature": temperature, **quarters}


def recall_by_quarters(predicted: Tensor, y: Tensor, counts: Tensor) -> dict[str, float]:
    """Return the mean recall, percent, of each quarter of the classes; ``counts`` are those of their training data."""
    recall = 100 * torch.from_numpy(recall_score(y, predicted, average=None, zero_division=0))
    quarters = counts.argsort(descending=True, stable=True).tensor_split(len(QUARTERS))
    return {name: recall[classes].mean().item() for name, classes in zip(QUARTERS, quarters, strict=True)}


def run_cell(
    name: str, cell: Cell, seeds: range, kd_settings: dict[str, float] | None, kept: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train and look at the students of a cell that ``kept`` lacks.

    Without ``kd_settings``, and if none are kept, KD's best of 36 are found first.
    """
    methods: dict[str, Any] = dict(kept["methods"]) if kept else {}
    missing = [method for method in ("KD", *METHODS) if method not in methods]
    if kept and not missing:
        return kept
    problem = cell.make()
    starts = [(warm_student(problem, seed, cell.warm), seed) for seed in seeds]
    kd_settings = kept["kd_settings"] if kept else kd_settings
    kd = kd_settings or best_kd(name, cell, problem, starts)["kd_settings"]
    for method in missing:
        if method == "KD":
            trained = [kd_students(problem, start, [kd], seed, cell.passes) for start, seed in starts]
        else:
            settings = {"temperature": kd["temperature"], **METHODS[method]}
            trained = [disk_student(problem, start, settings, seed, cell.passes) for start, seed in starts]
        each = [look(student, problem) for student in trained]
        methods[method] = {measure: [one[measure] for one in each] for measure in each[0]}
    found = {
        "kd_settings": kd,
        "teacher_test": problem.teacher_test,
        "class_counts": torch.bincount(problem.train.y).tolist(),
        "methods": methods,
        "differences": {method: differences(methods[method], methods["KD"]) for method in METHODS},
        "normalized": differences(methods[NORMALIZED], methods[DISK]),
    }
    return _rounded(found)


def differences(row: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, Any]:
    """Return a method's paired differences to another, such as KD, in every measure, with 95 % t-intervals."""
    return {measure: difference(row, other, measure) for measure in (*MEASURES, *QUARTERS)}


def kd_table(found: dict[str, Any]) -> str:
    """Return KD's means as Markdown, a row per problem."""
    lines = [f"| problem, start, passes | KD | {' | '.join(MEASURES.values())} |", "|---" * (2 + len(MEASURES)) + "|"]
    for name, row in found["rows"].items():
        kd, settings = row["methods"]["KD"], row["kd_settings"]
        cells = [f"temperature {settings['temperature']:g}, ce_weight {settings['ce_weight']:g}"]
        for measure in MEASURES:
            cells.append(f"{statistics.fmean(kd[measure]):.{_decimals(measure)}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(found: dict[str, Any], method: str) -> str:
    """Return a method's paired differences as Markdown, a row per problem: to KD, a normalized guide's to DiSK."""
    other = DISK if method == NORMALIZED else "KD"
    lines = [f"| {method}, minus {other} | {' | '.join(MEASURES.values())} |", "|---" * (1 + len(MEASURES)) + "|"]
    for name, row in found["rows"].items():
        paired = row["normalized"] if method == NORMALIZED else row["differences"][method]
        lines.append(f"| {name} | {' | '.join(_interval(paired[one], _decimals(one)) for one in MEASURES)} |")
    return "\n".join(lines)


def quarter_table(found: dict[str, Any]) -> str:
    """Return the recall on the problems of uneven classes as Markdown, a row per quarter of the classes."""
    methods = " | ".join(f"{name}, minus KD" for name in (DISK, UNIFORM))
    lines = [f"| problem, start, passes | classes | KD's recall, % | {methods} |", "|---" * 5 + "|"]
    for problem, row in ((name, row) for name, row in found["rows"].items() if name in UNEVEN):
        for name in QUARTERS:
            paired = " | ".join(_interval(row["differences"][method][name], 2) for method in (DISK, UNIFORM))
            recall = statistics.fmean(row["methods"]["KD"][name])
            lines.append(f"| {problem} | {name} | {recall:.2f} | {paired} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/probabilities"))
    parser.add_argument("--dry-run", action="store_true", help="two seeds, two passes, two cells")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for an interval, got {args.seeds}")
    torch.set_num_threads(1)
    seeds, cells = range(2 if args.dry_run else args.seeds), chosen_cells()
    if args.dry_run:
        cells = {name: cell._replace(warm=1, passes=2) for name, cell in [*cells.items()][-2:]}
    stored = json.loads((RESULTS / "gain.json").read_text())["rows"]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("probabilities-dry.json" if args.dry_run else "probabilities.json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    before = kept["rows"] if kept.get("seeds") == [*seeds] else {}
    rows = {}
    for name, cell in tqdm(cells.items(), desc="cells"):
        kd_settings = stored[name]["kd_settings"] if name in stored else None
        rows[name] = run_cell(name, cell, seeds, kd_settings, before.get(name))
    found = {"rows": rows, "seeds": [*seeds]}
    print("\n\n".join([kd_table(found), *(table(found, method) for method in METHODS), quarter_table(found)]))
    path.write_text(json.dumps(found, indent=1) + "\n")


def _interval(one: dict[str, Any], places: int) -> str:
    low, high = one["interval_95"]
    return f"{one['mean']:+.{places}f} ({low:+.{places}f} to {high:+.{places}f})"


def _decimals(measure: str) -> int:
    return 3 if measure.startswith("nll") else 2


def _rounded(found: Any) -> Any:
    """Round all floats in lists and dicts to what is stored."""
    if isinstance(found, dict):
        return {name: _rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_rounded(value) for value in found]
    return round(found, DECIMALS) if isinstance(found, float) else found


if __name__ == "__main__":
    main()
