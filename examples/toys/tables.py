"""The tables of both problems, for their documents."""

from typing import Any

from .rows import CE, DISK, KD, MAIN_ROWS, ROWS


def ablation(results: dict[str, Any]) -> str:
    """Return the share of starts in each minimum, percent, under each change, of the rows that were tried."""
    shown = [row for row in ROWS if any(row in tried for tried in results["rows"].values())]
    lines = [f"| change | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    for name, tried in results["rows"].items():
        shares = {
            row: " / ".join(f"{100 * count / results['starts']:.0f}" for count in ends.values())
            for row, ends in tried.items()
        }
        lines.append(f"| {name} | {' | '.join(shares.get(row, '') for row in shown)} |")
    minima = " / ".join(next(iter(tried.values())))
    return "\n".join([*lines, "", f"Percent of {results['starts']} starts in {minima}."])


def counts(toy: Any, results: dict[str, Any]) -> str:
    """Return percent of all starts with 95 % intervals, the paper's percent, and each set's global minimum."""
    lines = [f"| method | {' | '.join(toy.minima)} | the last, per set |", f"|---|{'---|' * len(toy.minima)}---|"]
    for method, row in results["rows"].items():
        cells = []
        for name, count in row["counts"].items():
            low, high = row["interval_95"][name]
            paper = toy.paper.get(method, {}).get(name)
            beside = "" if paper is None else f"; paper {paper}"
            share = 100 * count / sum(row["counts"].values())
            cells.append(f"{share:.1f} ({low:.1f} to {high:.1f}{beside})")
        last = " / ".join(str(ends[-1]) for ends in row["per_set"])
        lines.append(f"| {method} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


def summary(toy: Any, results: dict[str, Any]) -> str:
    """Return a row of the summary: percent in the global minimum with its interval, then the paper's counts."""
    last, cells = toy.minima[-1], []
    for row in (results["rows"][name] for name in MAIN_ROWS):
        low, high = row["interval_95"][last]
        cells.append(f"{100 * row['counts'][last] / sum(row['counts'].values()):.0f} ({low:.0f} to {high:.0f})")
    paper = ", ".join(str(toy.paper[name][last]) for name in (CE, KD, DISK))
    return f"| {toy.title} | {' | '.join(cells)} | {paper} |"


def bars(axes: Any, toy: Any, results: dict[str, Any]) -> None:
    """Draw the share of starts in each minimum, a bar per row."""
    wide = 0.8 / len(results["rows"])
    for shift, (name, row) in enumerate(results["rows"].items()):
        shares = [100 * count / sum(row["counts"].values()) for count in row["counts"].values()]
        axes.bar([place + wide * shift for place in range(len(shares))], shares, wide, label=name)
    axes.set_xticks(
        [place + 0.4 for place in range(len(toy.minima))], [name.removesuffix(", global") for name in toy.minima]
    )
    axes.set(title="starts per minimum", ylabel="%")
    axes.legend(fontsize="small")
