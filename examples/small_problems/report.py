"""Tables of what was found: gains over KD's best with intervals, and which form the rule picks."""

import re
from typing import Any

import torch
from scipy import stats

from .candidates import problem_of

LEAST_NOISE = 0.5  # points: less behind KD counts as nothing
DATA_LIMITED = ("digits",)  # the problem, not its shifted twin: the students overfit it


def slug(name: str) -> str:
    """Name of a cell's file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def difference(row: dict[str, list[float]], kd: dict[str, list[float]], split: str) -> dict[str, Any]:
    """Paired difference to KD on a split: mean, standard error, 95 % t-interval, values."""
    values = torch.tensor(row[split], dtype=torch.float64) - torch.tensor(kd[split], dtype=torch.float64)
    error = values.std().item() / len(values) ** 0.5
    half = error * stats.t.ppf(0.975, len(values) - 1)
    mean = values.mean().item()
    return {"mean": mean, "error": error, "interval_95": [mean - half, mean + half], "values": values.tolist()}


def choice(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Judge every form on validation data; name the one that the rule picks."""
    forms = [form for form in cells[0]["rows"] if form != "KD"]
    rows: dict[str, Any] = {}
    for form in forms:
        each = {cell["cell"]: difference(cell["rows"][form], cell["rows"]["KD"], "validation") for cell in cells}
        behind = [name for name, one in each.items() if one["mean"] < -max(2 * one["error"], LEAST_NOISE)]
        rows[form] = {
            "mean_gain": _over_problems(each),
            "mean_gain_capacity": _over_problems(
                {name: one for name, one in each.items() if problem_of(name) not in DATA_LIMITED} or each
            ),
            "behind": behind,
            "cells": each,
        }
    safe = [form for form in forms if not rows[form]["behind"]]
    key = "mean_gain" if safe else "mean_gain_capacity"
    picked = max(safe or forms, key=lambda form: rows[form][key])
    lines = [
        "| form | mean gain over KD's best | cells behind KD by more than noise | worst cell |",
        "|---|---|---|---|",
    ]
    for form in sorted(forms, key=lambda form: -rows[form]["mean_gain"]):
        row = rows[form]
        worst = min(row["cells"], key=lambda name: row["cells"][name]["mean"])
        lines.append(
            f"| {form} | {row['mean_gain']:+.2f} | {len(row['behind'])} of {len(cells)} | "
            f"{row['cells'][worst]['mean']:+.2f} ({worst}) |"
        )
    lines += ["", f"By the rule: {picked}{'' if safe else ' (no form is behind KD nowhere)'}."]
    return {"picked": picked, "rows": rows, "seeds": cells[0]["seeds"], "table": "\n".join(lines)}


def gain(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Tabulate test accuracies: KD's best, and each form's paired difference to it."""
    forms = [form for form in cells[0]["rows"] if form != "KD"]
    lines = [
        f"| problem, start, passes | teacher | KD, best of 36 | {' | '.join(forms)} |",
        f"|---|---|---|{'---|' * len(forms)}",
    ]
    rows: dict[str, Any] = {}
    for cell in cells:
        kd = cell["rows"]["KD"]
        each = {form: difference(cell["rows"][form], kd, "test") for form in forms}
        rows[cell["cell"]] = {
            "kd": kd,
            "kd_settings": cell["kd_settings"],
            "teacher_test": cell["teacher_test"],
            "differences": each,
            "rows": {form: cell["rows"][form] for form in forms},
        }
        settings = cell["kd_settings"]
        mean = sum(kd["test"]) / len(kd["test"])
        shown = f"{mean:.2f} (temperature {settings['temperature']:g}, ce_weight {settings['ce_weight']:g})"
        intervals = [
            f"{one['mean']:+.2f} ({one['interval_95'][0]:+.2f} to {one['interval_95'][1]:+.2f})"
            for one in each.values()
        ]
        lines.append(f"| {cell['cell']} | {cell['teacher_test']:.1f} | {shown} | {' | '.join(intervals)} |")
    return {"rows": rows, "seeds": cells[0]["seeds"], "table": "\n".join(lines)}


def _over_problems(each: dict[str, dict[str, Any]]) -> float:
    """Mean over problems of the means over their cells."""
    by_problem: dict[str, list[float]] = {}
    for name, one in each.items():
        by_problem.setdefault(problem_of(name), []).append(one["mean"])
    means = [sum(values) / len(values) for values in by_problem.values()]
    return sum(means) / len(means)
