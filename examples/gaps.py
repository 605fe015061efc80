"""Does ``capacity_gap`` recommend what pays? On four problems that had no part in its rule.

Trains students with CE, as the warm starts of gain.py, looks at each with ``capacity_gap`` on training and validation
data, and puts what gain.py measured on test data beside the recommendation.

Usage: python examples/gaps.py [--seeds N] [--out DIR] [--dry-run]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from small_problems import candidates
from small_problems.candidates import Cell
from small_problems.training import warm_student

from disk_plugin.diagnostics import capacity_gap

RESULTS = Path(__file__).parent / "results"
FORM = "DiSK, default"
PROBLEMS = ("scaffold_target 12", "scaffold_target 24", "clusters (new)", "few samples (new)")  # with a teacher to run
GAPS = {"by_capacity": "gap by capacity", "by_data": "gap by data"}


def warm_cells() -> dict[str, Cell]:
    """Return the problems' warm-started cells of gain.py."""
    cells = candidates.cells(Path()) | candidates.new_cells()
    return {name: cell for name, cell in cells.items() if candidates.problem_of(name) in PROBLEMS and cell.warm}


def look(cell: Cell, seeds: range) -> dict[str, Any]:
    """Return the gaps in points and the recommendations for students of several seeds."""
    problem = cell.make()
    found: dict[str, Any] = {name: [] for name in (*GAPS, "verdict")}
    for seed in seeds:
        student = warm_student(problem, seed, cell.warm).eval()
        gap = capacity_gap(student, problem.teacher, [problem.train], [problem.validation])
        for name in GAPS:
            found[name].append(100 * getattr(gap, name))
        found["verdict"].append(gap.verdict)
    return found


def table(found: dict[str, Any]) -> str:
    """Return a row per problem as Markdown; gaps are means over the students."""
    lines = [f"| problem | {' | '.join(GAPS.values())} | recommended | DiSK minus KD, measured |", "|---" * 5 + "|"]
    for name, row in found.items():
        gaps = " | ".join(f"{statistics.fmean(row[gap]):.1f}" for gap in GAPS)
        chosen = max(row["verdict"], key=row["verdict"].count)
        count = f"{row['verdict'].count(chosen)} of {len(row['verdict'])} students"
        low, high = row["measured"]["interval_95"]
        measured = f"{row['measured']['mean']:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(f"| {name} | {gaps} | {chosen} ({count}) | {measured} |")
    return "\n".join(lines)


def main() -> None:
    """Look at all problems, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/gaps"))
    parser.add_argument("--dry-run", action="store_true", help="one seed, one pass")
    args = parser.parse_args()
    measured = json.loads((RESULTS / "gain.json").read_text())["rows"]
    found = {}
    for name, cell in warm_cells().items():
        cell = cell._replace(warm=1) if args.dry_run else cell
        seen = look(cell, range(1 if args.dry_run else args.seeds))
        found[name] = seen | {"measured": measured[name]["differences"][FORM]}
    print(table(found))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gaps.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
