"""Tables and the figure of the map."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import rule as rules
from .arms import ARMS
from .cells import gain
from .rule import MARGIN, Point, Rule

LIMIT = 6.0  # of the colours, percent points
COLOURS = {"cmap": "RdBu", "vmin": -LIMIT, "vmax": LIMIT}


def write(results: dict[str, Any], out: Path) -> None:
    """Draw the map; print the real problems and the rule."""
    draw(results).savefig(out / "regime_map.png", dpi=130)
    print(table(results))
    print()
    print(summary(results))


def table(results: dict[str, Any]) -> str:
    """Return one Markdown row per real problem, with both gaps and the rule's recommendation."""
    cells = rules.points(results)
    rule = rules.derive(cells)
    lines = ["| problem | gap by capacity | gap by data | the rule | minus KD, points |", "|---|---|---|---|---|"]
    for cell in cells:
        if not cell.synthetic:
            said = "DiSK" if rule(cell) else "KD"
            lead = f"{cell.gain:+.2f} ± {cell.error:.2f}"
            lines.append(f"| {cell.name} | {cell.capacity:.1f} | {cell.data:.1f} | {said} | {lead} |")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """Return the rule and how often it is right, in words."""
    cells = rules.points(results)
    rule, synthetic = rules.derive(cells), [cell for cell in cells if cell.synthetic]
    real = [cell for cell in cells if not cell.synthetic]
    lines = [
        f"Rule: DiSK where the gap by capacity is at least {rule.capacity:g} points and the gap by data at most "
        f"{rule.data:g}. Its sign over the cells with a gain or loss of more than {MARGIN:g} points:",
        "",
    ]
    scores = {
        "the synthetic cells": rules.score(synthetic, map(rule, synthetic)),
        "the same, each problem left out in turn": rules.left_out(cells),
        "the real problems, which had no part in it": rules.score(real, map(rule, real)),
        "for comparison, DiSK in all synthetic cells": rules.score(synthetic, [True] * len(synthetic)),
    }
    for name, found in scores.items():
        lines.append(
            f"- {name}: right in {found.right} of {found.clear}; {found.gains_missed} gains missed, "
            f"{found.losses_taken} losses taken; mean {found.mean_gain:+.2f} over the {found.recommended} recommended"
        )
    others = [cell.gain for cell in synthetic if not rule(cell)]
    if others:  # a map may recommend DiSK everywhere
        said = f"where the rule says KD, {len(others)} synthetic cells, DiSK's mean is {rules.mean(others):+.2f}"
        lines.append(f"- {said}")
    seconds = sum(problem["cpu_seconds"] for problem in results["problems"].values())
    return "\n".join([*lines, "", f"{len(cells)} cells, {seconds / 60:.0f} minutes of one core."])


def draw(results: dict[str, Any]) -> Figure:
    """Heat maps of each form of DiSK minus KD, by width and images, and all cells by their two gaps."""
    names = list(dict.fromkeys(p["cells"][0]["problem"] for p in results["problems"].values()))
    names = [name for name in names if "clusters" in name]
    figure = Figure(figsize=(3.4 * len(names), 3.0 * len(ARMS) + 4.6), layout="constrained")
    grid = figure.add_gridspec(len(ARMS) + 1, len(names), height_ratios=[3.0] * len(ARMS) + [4.6])
    for i, arm in enumerate(ARMS):
        for j, name in enumerate(names):
            cells = [c for p in results["problems"].values() for c in p["cells"] if c["problem"] == name]
            axes = figure.add_subplot(grid[i, j])
            _heat_map(axes, cells, arm)
            axes.set_title(f"{arm} - KD, {name}", size=9)
    points = rules.points(results)
    axes = figure.add_subplot(grid[-1, :])
    _scatter(axes, points, rules.derive(points))
    return figure


def _heat_map(axes: Axes, cells: list[dict[str, Any]], arm: str) -> None:
    widths, images = (sorted({cell[key] for cell in cells}) for key in ("width", "images"))
    values = [[float("nan")] * len(images) for _ in widths]
    for cell in cells:
        i, j = widths.index(cell["width"]), images.index(cell["images"])
        values[i][j] = rules.mean(gain(cell, arm))
        color = "white" if abs(values[i][j]) > 0.7 * LIMIT else "black"
        axes.text(j, i, f"{values[i][j]:+.1f}", ha="center", va="center", size=8, color=color)
    axes.imshow(values, origin="lower", aspect="auto", **COLOURS)
    axes.set_xticks(range(len(images)), [f"{each:,}" for each in images])
    axes.set_yticks(range(len(widths)), widths)
    axes.set(xlabel="training images", ylabel="student width")


def _scatter(axes: Axes, points: list[Point], rule: Rule) -> None:
    for synthetic, style in {True: {"marker": "o", "s": 45}, False: {"marker": "D", "s": 75}}.items():
        part = [point for point in points if point.synthetic == synthetic]
        places = [[point.capacity for point in part], [point.data for point in part]]
        label = "synthetic cell" if synthetic else "real problem"
        style |= {"c": [point.gain for point in part], "edgecolors": "black", "linewidths": 0.6, **COLOURS}
        drawn = axes.scatter(*places, label=label, **style)
    for point in points:
        if not point.synthetic:
            axes.annotate(point.name, (point.capacity, point.data), (6, 4), textcoords="offset points", size=7)
    bottom, top = axes.get_ylim()
    corner = [rule.capacity, rule.capacity, 100], [bottom, min(rule.data, top), min(rule.data, top)]
    axes.plot(*corner, "k--", linewidth=1, label="rule: DiSK")
    axes.figure.colorbar(drawn, ax=axes, label=f"{rules.ARM} - KD, points")
    axes.set(xlabel="gap by capacity: teacher - student, training accuracy", ylabel="gap by data: training - held-out")
    axes.legend(fontsize="small")
