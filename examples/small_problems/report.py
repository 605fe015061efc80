"""Tables of the results: gains over KD's best with intervals, and the form that the rule selects."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats

from .candidates import problem_of

LEAST_NOISE = 0.5  # points: smaller losses against KD are ignored
DATA_LIMITED = ("digits",)  # the problem, not its shifted twin: the students overfit it


def slug(name: str) -> str:
    """Return the name of a cell's file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def difference(row: dict[str, list[float]], kd: dict[str, list[float]], split: str) -> dict[str, Any]:
    """Paired difference to KD on a split: mean, standard error, 95 % t-interval, values."""
    values = torch.tensor(row[split], dtype=torch.float64) - torch.tensor(kd[split], dtype=torch.float64)
    error = values.std().item() / len(values) ** 0.5
    half = error * stats.t.ppf(0.975, len(values) - 1)
    mean = values.mean().item()
    return {"mean": mean, "error": error, "interval_95": [mean - half, mean + half], "values": values.tolist()}


def choice(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Evaluate every form on validation data; name the one that the rule selects."""
    rows: dict[str, Any] = {}
    for form in _forms(cells[0]["rows"]):
        each = {cell["cell"]: difference(cell["rows"][form], cell["rows"]["KD"], "validation") for cell in cells}
        capacity = {name: one for name, one in each.items() if problem_of(name) not in DATA_LIMITED}
        rows[form] = {
            "mean_gain": _over_problems(each),
            "mean_gain_capacity": _over_problems(capacity or each),
            "behind": [name for name, one in each.items() if one["mean"] < -max(2 * one["error"], LEAST_NOISE)],
            "cells": each,
        }
    return {"picked": picked(rows), "rows": rows, "seeds": cells[0]["seeds"]}


def picked(rows: dict[str, Any]) -> str:
    """Apply the rule."""
    safe = [form for form in rows if not rows[form]["behind"]]
    key = "mean_gain" if safe else "mean_gain_capacity"
    return max(safe or rows, key=lambda form: rows[form][key])


def choice_table(found: dict[str, Any]) -> str:
    """Return the forms, sorted by mean gain."""
    rows = found["rows"]
    lines = [
        "| form | mean gain over KD's best | cells behind KD by more than noise | worst cell |",
        "|---|---|---|---|",
    ]
    for form in sorted(rows, key=lambda form: -rows[form]["mean_gain"]):
        row = rows[form]
        worst = min(row["cells"], key=lambda name: row["cells"][name]["mean"])
        lines.append(
            f"| {form} | {row['mean_gain']:+.2f} | {len(row['behind'])} of {len(row['cells'])} | "
            f"{row['cells'][worst]['mean']:+.2f} ({worst}) |"
        )
    safe = "" if not rows[found["picked"]]["behind"] else " (no form is behind KD nowhere)"
    return "\n".join([*lines, "", f"By the rule: {found['picked']}{safe}."])


def gain(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare test accuracies: each form's paired difference to KD's best."""
    rows: dict[str, Any] = {}
    for cell in cells:
        kd = cell["rows"]["KD"]
        rows[cell["cell"]] = {
            "kd": kd,
            "kd_settings": cell["kd_settings"],
            "teacher_test": cell["teacher_test"],
            "differences": {form: difference(cell["rows"][form], kd, "test") for form in _forms(cell["rows"])},
            "rows": {form: cell["rows"][form] for form in _forms(cell["rows"])},
        }
    return {"rows": rows, "seeds": cells[0]["seeds"]}


def gain_table(found: dict[str, Any], forms: Sequence[str] = ()) -> str:
    """Return a row per cell, with 95 % intervals; a column per form, by default of all."""
    forms = forms or [*next(iter(found["rows"].values()))["differences"]]
    lines = [
        f"| problem, start, passes | teacher | KD, best of 36 | {' | '.join(forms)} |",
        f"|---|---|---|{'---|' * len(forms)}",
    ]
    for name, row in found["rows"].items():
        settings, scores = row["kd_settings"], row["kd"]["test"]
        kd = f"{sum(scores) / len(scores):.2f} (temperature {settings['temperature']:g}, "
        kd += f"ce_weight {settings['ce_weight']:g})"
        intervals = []
        for form in forms:
            one = row["differences"][form]
            low, high = one["interval_95"]
            intervals.append(f"{one['mean']:+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"| {name} | {row['teacher_test']:.1f} | {kd} | {' | '.join(intervals)} |")
    return "\n".join(lines)


def network_adds(found: dict[str, Any], form: str, control: str) -> dict[str, Any]:
    """Paired difference between two forms over all cells: a mean, and its 95 % interval over the cells' means."""
    means = []
    for row in found["rows"].values():
        one = difference(row["rows"][form], row["rows"][control], "test")
        means.append(one["mean"])
    values = torch.tensor(means, dtype=torch.float64)
    half = values.std().item() / len(means) ** 0.5 * stats.t.ppf(0.975, len(means) - 1)
    mean = values.mean().item()
    return {"mean": mean, "interval_95": [float(mean - half), float(mean + half)], "cells": len(means)}


def _forms(rows: dict[str, Any]) -> list[str]:
    return [form for form in rows if form != "KD"]


def _over_problems(each: dict[str, dict[str, Any]]) -> float:
    """Mean over problems of the means over their cells."""
    by_problem: dict[str, list[float]] = {}
    for name, one in each.items():
        by_problem.setdefault(problem_of(name), []).append(one["mean"])
    means = [sum(values) / len(values) for values in by_problem.values()]
    return sum(means) / len(means)
