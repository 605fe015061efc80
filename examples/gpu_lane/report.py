"""What the lane's results come to: accuracies per seed, and differences to the better KD of the same seeds."""

import statistics
from typing import Any

from small_images.paired import paired, shown_difference

from .methods import METHODS, REFERENCE


def summary(
    rows: list[dict[str, Any]], unfinished: dict[str, Any], protocol: dict[str, Any], **about: Any
) -> dict[str, Any]:
    """Return accuracies by student and method, each with its difference to the KD that is better in the mean.

    ``about`` is said of this call; a row says itself where it was finished.
    """
    students: dict[str, dict[str, Any]] = {}
    for row in rows:
        students.setdefault(row["student"], {}).setdefault(row["method"], {})[str(row["seed"])] = row["accuracy"]
    found = {student: _compared(methods) for student, methods in students.items()}
    about["finished_on"] = list(dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in rows))
    about["teacher_accuracy"] = rows[0]["teacher"] if rows else None
    return {**about, "protocol": protocol, "students": found, "unfinished": unfinished}


def _compared(methods: dict[str, dict[str, float]]) -> dict[str, Any]:
    means = {name: statistics.fmean(seeds.values()) for name, seeds in methods.items()}
    rivals = {name: mean for name, mean in means.items() if METHODS[name][0] == REFERENCE}
    best = max(rivals, key=rivals.__getitem__) if rivals else None
    found = {}
    for name, seeds in methods.items():
        other = methods[best] if best else {}
        gap = [value - other[seed] for seed, value in seeds.items() if seed in other]
        found[name] = {
            "accuracy": seeds,
            "mean": means[name],
            "against": best,
            "minus_kd": paired(gap) if gap and name != best else None,
        }
    return found


def table(found: dict[str, Any]) -> str:
    """Return the summary as Markdown."""
    protocol = found["protocol"]
    lines = [
        f"{protocol['data']}; {protocol['epochs']} epochs after {protocol['warm_epochs']} of CE; "
        f"{protocol['views']} views; {'; '.join(found['finished_on']) or 'nothing finished'}.",
    ]
    teacher = "" if found["teacher_accuracy"] is None else f" ({found['teacher_accuracy']:.2f})"
    for student, methods in found["students"].items():
        lines += ["", f"{protocol['teacher']}{teacher} -> {student}, test accuracy of the last epoch", ""]
        lines += [
            "| method | per seed | mean | minus the better KD (95 % interval) | per seed |",
            "|---|---|---|---|---|",
        ]
        for name, each in methods.items():
            values = " / ".join(f"{value:.2f}" for value in each["accuracy"].values())
            gap = each["minus_kd"]
            single = " / ".join(f"{value:+.2f}" for value in gap["values"]) if gap else ""
            lines.append(f"| {name} | {values} | {each['mean']:.2f} | {shown_difference(gap)} | {single} |")
    for name, row in found["unfinished"].items():
        scores = row["accuracies"]
        reached = f", {scores[-1][1]:.2f} after {scores[-1][0]}" if scores else ""
        lines.append(f"unfinished: {row['student']} seed {row['seed']} {name}, {row['epochs']} epochs{reached}")
    return "\n".join(lines)
