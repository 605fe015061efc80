"""Results of the CIFAR-100 example: statistics over the seeds, tables, curves."""

import csv
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from .paired import paired, shown_difference

_KINDS = ("right", "wrong")


Runs = dict[int, list[dict[str, float]]]  # seed -> log of the epochs


def summary(runs: Runs, passes: dict[str, float]) -> dict[str, Any]:
    """Return last-epoch accuracies over the seeds; separately the best epoch, as it selects on test data."""
    last = torch.tensor([run[-1]["accuracy"] for run in runs.values()], dtype=torch.float64)
    best = torch.tensor([max(epoch["accuracy"] for epoch in run) for run in runs.values()], dtype=torch.float64)
    return {
        "seeds": list(runs),
        "last_epoch": last.tolist(),
        "mean": last.mean().item(),
        "std": last.std().item() if len(last) > 1 else None,
        "best_on_test_mean": best.mean().item(),
        "passes": passes,
    }


def better_kd(logs: dict[str, Runs]) -> str | None:
    """Return the KD row with the best mean over the seeds that all of them have."""
    common = set.intersection(*map(set, logs.values())) if logs else set()
    if not common:
        return max(logs, key=lambda name: len(logs[name]), default=None)
    return max(logs, key=lambda name: statistics.fmean(logs[name][seed][-1]["accuracy"] for seed in common))


def differences(logs: dict[str, Runs], reference: str | None) -> dict[str, Any]:
    """Return paired differences to a row, over the seeds that both have, with a 95 % t-interval from two seeds on."""
    found: dict[str, Any] = {}
    for name, runs in logs.items():
        common = [seed for seed in runs if seed in logs.get(reference, {})]
        if name == reference or not common:
            continue
        gap = [runs[seed][-1]["accuracy"] - logs[reference][seed][-1]["accuracy"] for seed in common]
        found[f"{name} - {reference}"] = {**paired(gap), "seeds": common}
    return found


def table(results: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        "| method | test accuracy, last epoch, per seed | mean ± std | minus KD (95 % interval) "
        "| student passes | extra forwards | best epoch on test (selects on test) |",
        "|---|---|---|---|---|---|---|",
    ]
    kd, seeds = results.get("kd", "kd"), results["protocol"]["seeds"]
    for name, row in results["methods"].items():
        values = " / ".join(f"{value:.2f}" for value in row["last_epoch"])
        std = f" ± {row['std']:.2f}" if row["std"] is not None else ""
        if len(row["last_epoch"]) < seeds:
            values += f" ({len(row['last_epoch'])} of {seeds} seeds: {', '.join(map(str, row['seeds']))})"
        shown = shown_difference(results["differences"].get(f"{name} - {kd}"))
        passes = f"{row['passes']['student']:g} | {row['passes']['extra_forwards']:g}"
        lines.append(
            f"| {name} | {values} | {row['mean']:.2f}{std} | {shown} | {passes} | {row['best_on_test_mean']:.2f} |"
        )
    warm = " / ".join(f"{value:.2f}" for value in results["warm_start"])
    lines += ["", f"Teacher {results['teacher']:.2f}; warm start {warm}."]
    if len(results.get("kd_rows", [])) > 1:
        lines[-1] += f" KD is the better of its rows {' and '.join(results['kd_rows'])}, which is {kd}."
    against = shown_difference(results["differences"].get("disk - uniform"))
    if against:
        lines[-1] += f" What the trained guide adds: disk minus uniform {against}."
    return "\n".join(lines)


def search_table(search: dict[str, Any]) -> str:
    """Return every trial of the search as Markdown, with its guide's statistics of the last epoch."""
    lines = [
        "| trial | settings | held-out accuracy | g right / wrong | discount right / wrong | usage / budget |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(search["rows"].items(), key=lambda item: -item[1]["accuracy"]):
        last, cells = row["log"][-1], ["", "", ""]
        if "usage" in last:
            cells = [f"{last[f'{key}_right']:.2f} / {last[f'{key}_wrong']:.2f}" for key in ("guide", "discount")]
            cells.append(f"{last['usage']:.2f} / {last['budget']:.2f}")
        settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
        lines.append(f"| {name} | {settings} | {row['accuracy']:.2f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Teacher {search['teacher']:.2f}, warm start {search['warm_start']:.2f}."])


def write_curves(results: dict[str, Any], out: Path, name: str) -> None:
    """Write one CSV row per method, seed and epoch, and the curves as PNG."""
    rows = [
        {"method": method, "seed": seed, **epoch}
        for method, runs in results["logs"].items()
        for seed, run in zip(results["methods"][method]["seeds"], runs, strict=True)
        for epoch in run
    ]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    figure = Figure(figsize=(11, 4), layout="constrained")
    accuracy, guide = figure.subplots(1, 2)
    for method, runs in results["logs"].items():
        epochs = range(1, len(runs[0]) + 1)
        mean = torch.tensor([[epoch["accuracy"] for epoch in run] for run in runs]).mean(0)
        accuracy.plot(epochs, mean, label=method)
        for key, style in (("discount_right", "-"), ("discount_wrong", "--")):
            if key in runs[0][0]:
                mean = torch.tensor([[epoch[key] for epoch in run] for run in runs]).mean(0)
                guide.plot(epochs, mean, style, label=f"{method}: {key.replace('_', ', ')}")
    accuracy.set(xlabel="epoch", ylabel="test accuracy, % (mean over seeds)")
    guide.set(xlabel="epoch", ylabel="discount (share of the teacher's pull taken off)", ylim=(0, 1))
    for axes in (accuracy, guide):
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(out / f"{name}.png", dpi=110)


def compared_table(results: dict[str, Any]) -> str:
    """Return held-out accuracies over fresh starts, and of the start they were selected on, as Markdown."""
    lines = ["| trial | when chosen | two fresh starts | mean | minus KD, each |", "|---|---|---|---|---|"]
    for name, row in results["methods"].items():
        values = " / ".join(f"{value:.2f}" for value in row["last_epoch"])
        gap = results["differences"].get(f"{name} - kd")
        shown = " / ".join(f"{value:+.2f}" for value in gap["values"]) if gap else ""
        lines.append(f"| {name} | {results['when_chosen'][name]:.2f} | {values} | {row['mean']:.2f} | {shown} |")
    return "\n".join(lines)


def regimes_table(results: dict[str, Any]) -> str:
    """Return the regimes as Markdown, with DiSK's guide statistics of the last epoch."""
    lines = [
        "| regime | method | held-out accuracy, per seed | minus KD (95 % interval) | g right / wrong "
        "| discount right / wrong |",
        "|---|---|---|---|---|---|",
    ]
    for name, regime in results["regimes"].items():
        for method, row in regime["methods"].items():
            values = " / ".join(f"{value:.2f}" for value in row["last_epoch"])
            shown = shown_difference(regime["differences"].get(f"{method} - kd"))
            last = [run[-1] for run in regime["logs"][method]]
            cells = [
                " / ".join(f"{statistics.fmean(each[f'{key}_{kind}'] for each in last):.3f}" for kind in _KINDS)
                if "usage" in last[0]
                else ""
                for key in ("guide", "discount")
            ]
            lines.append(f"| {name} | {method} | {values} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_table(results: dict[str, Any]) -> str:
    """Return the seconds per epoch as Markdown."""
    taken = results["seconds_per_epoch"]
    lines = ["| method alone | seconds per epoch | over KD's |", "|---|---|---|"]
    for name, value in taken.items():
        ratio = "" if "teacher" in name else f"{value / taken['kd']:.2f}"
        lines.append(f"| {name} | {value:.1f} | {ratio} |")
    return "\n".join(lines)


def write_modules(modules: dict[str, Any], path: Path) -> None:
    """Write rate against distortion of CIFD's modules, with each one's accuracy, as PNG."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(modules["rate"], modules["distortion"], "o-")
    rows = zip(modules["distortion_weights"], modules["rate"], modules["distortion"], modules["accuracy"], strict=True)
    for weight, rate, distortion, accuracy in rows:
        axes.annotate(f"  R = {weight:g}: {accuracy:.1f} %", (rate, distortion))
    title = f"held-out accuracy of each module; of the teacher {modules['teacher_accuracy']:.1f} %"
    axes.set(xlabel="rate, nats per image", ylabel="distortion (mean smooth L1)")
    axes.set(xlim=(0, 1.6 * max(modules["rate"])), ylim=(0, 1.15 * max(modules["distortion"])))
    axes.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=110)


def write(results: dict[str, Any], shown: str, path: Path) -> None:
    """Print results as a table and store them."""
    print(shown)
    path.write_text(json.dumps(results, indent=1) + "\n")


def machine(device: str) -> str:
    """Return the hardware and torch's version."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}), torch {torch.__version__}"
