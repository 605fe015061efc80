"""What the lane's results come to: accuracies per seed, and differences to the better KD of the same seeds."""

import statistics
from typing import Any

from .methods import METHODS, REFERENCE


def summary(
    rows: list[dict[str, Any]], unfinished: dict[str, Any], protocol: dict[str, Any], **about: Any
) -> dict[str, Any]:
    """Return accuracies by student and method, each with its difference to the KD that is better in the mean."""
    students: dict[str, dict[str, Any]] = {}
    for row in rows:
        students.setdefault(row["student"], {}).setdefault(row["method"], {})[str(row["seed"])] = row["accuracy"]
    found = {student: _compared(methods) for student, methods in students.items()}
    return {**about, "protocol": protocol, "students": found, "unfinished": unfinished}


def _compared(methods: dict[str, dict[str, float]]) -> dict[str, Any]:
    means = {name: statistics.fmean(seeds.values()) for name, seeds in methods.items()}
    rivals = {name: mean for name, mean in means.items() if METHODS[name][0] == REFERENCE}
    best = max(rivals, key=rivals.__getitem__) if rivals else None
    found = {}
    for name, seeds in methods.items():
        other = methods[best] if best else {}
        found[name] = {
            "accuracy": seeds,
            "mean": means[name],
            "against": best,
            "minus_kd": {seed: value - other[seed] for seed, value in seeds.items() if seed in other},
        }
    return found


def table(found: dict[str, Any]) -> str:
    """Return the summary as Markdown."""
    protocol = found["protocol"]
    lines = [
        f"{protocol['data']}; {protocol['epochs']} epochs after {protocol['warm_epochs']} of CE; "
        f"{protocol['views']} views; {found['device']}, torch {found['torch']}.",
    ]
    for student, methods in found["students"].items():
        lines += ["", f"{protocol['teacher']} -> {student}, test accuracy of the last epoch", ""]
        lines += ["| method | per seed | mean | minus the better KD, per seed |", "|---|---|---|---|"]
        for name, each in methods.items():
            values = " / ".join(f"{value:.2f}" for value in each["accuracy"].values())
            behind = " / ".join(f"{value:+.2f}" for value in each["minus_kd"].values())
            lines.append(f"| {name} | {values} | {each['mean']:.2f} | {'' if name == each['against'] else behind} |")
    for name, row in found["unfinished"].items():
        scores = row["accuracies"]
        reached = f", {scores[-1][1]:.2f} after {scores[-1][0]}" if scores else ""
        lines.append(f"unfinished: {row['student']} seed {row['seed']} {name}, {row['epochs']} epochs{reached}")
    return "\n".join(lines)
