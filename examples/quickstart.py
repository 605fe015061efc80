"""Does DiSK help here? Teacher, then CE, KD and DiSK students on scikit-learn's digits, in about a minute on a CPU.

Every student starts from the same CE-trained one and gets the same number of passes over the data, with the same
optimizer. Settings of KD and DiSK were searched with the same number of trials on the validation split (``--search``,
frozen in results/quickstart_search.json); the test split is read once per student, when its training is over.

Usage: python examples/quickstart.py [--dry-run] [--search] [--seeds N] [--out DIR]
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import digits
import torch
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.schedule import estimate_budget
from disk_plugin.taps import FeatureTap, with_features
from disk_plugin.variants import VARIANTS

METHODS = ("CE", "KD", "DiSK")
SEARCH_FILE = Path(__file__).parent / "results" / "quickstart_search.json"
SEARCH_SEEDS = (100, 101, 102, 103, 104)  # never those of the report
TRIALS = 36
LEARNING_RATE = 0.1  # with momentum .9 and a cosine, the paper's recipe for every method
CE_WEIGHTS, TEMPERATURES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BUDGETS = (None, 0.02, 0.05, 0.2, 0.5)  # None: estimate_budget, the paper's heuristic
SCAFFOLDS = ((None, "all"), (3, "scaffolded"))  # (top_k, teacher_target)


class Data:
    """The splits, the trained teacher and its outputs on the training split."""

    def __init__(self, *, dry_run: bool) -> None:
        self.passes = {"teacher": 40, "warm": 30, "student": 120}
        if dry_run:
            self.passes = dict.fromkeys(self.passes, 3)
        self.splits = digits.splits()
        self.teacher: FeatureTap = with_features(digits.trained_teacher(self.splits["train"], self.passes["teacher"]))
        with torch.no_grad():
            self.logits, self.features = self.teacher(self.splits["train"].x)


class Run:
    """One student trained with one method: accuracies, seconds, and what the guide did."""

    def __init__(self, data: Data, method: str, settings: dict[str, Any], seed: int, *, report: bool) -> None:
        self.data, self.best, self.best_student, self.curve = data, -1.0, None, []
        train = data.splits["train"]
        self.student = digits.warm_student(train, data.passes["warm"], seed)
        torch.manual_seed(seed)
        self.disk = self.dual = None
        if method == "DiSK":
            self._make_disk(settings)
        self.report = report
        losses = {"CE": digits.ce_loss, "KD": self._kd, "DiSK": self._disk}
        self.settings, self.watching, start = settings, 0.0, time.perf_counter()
        digits.train(
            self.student,
            train,
            data.passes["student"],
            seed,
            losses[method],
            lr=LEARNING_RATE,
            extra_parameters=self.disk.parameters() if self.disk else (),
            after_epoch=self._after_epoch,
        )
        self.seconds = time.perf_counter() - start - self.watching
        self.validation = digits.accuracy(self.student, data.splits["validation"])

    def _make_disk(self, settings: dict[str, Any]) -> None:
        budget = settings["budget"]
        if budget is None:
            budget = estimate_budget(self.student, [self.data.splits["validation"]])
        self.disk = DiSKLoss(
            GuideHead(digits.NUM_CLASSES, self.data.teacher.feature_dim),
            ce_weight=settings["ce_weight"],
            distill_weight=1 - settings["ce_weight"],
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            variant=VARIANTS["paper"]._replace(teacher_target=settings["teacher_target"]),
            budget=budget,
        )
        self.dual = DualScheduler(self.disk, epochs=self.data.passes["student"])

    def _kd(self, model, x, y, index):
        return functional.kd_loss(
            model(x),
            self.data.logits[index],
            y,
            ce_weight=self.settings["ce_weight"],
            distill_weight=1 - self.settings["ce_weight"],
            temperature=self.settings["temperature"],
        )

    def _disk(self, model, x, y, index):
        return self.disk(model(x), self.data.logits[index], y, self.data.features[index])

    def _after_epoch(self, epoch: int) -> None:
        if self.dual:
            self.dual.step()
        start = time.perf_counter()
        if self.report:
            accuracy = digits.accuracy(self.student, self.data.splits["validation"])
            if accuracy > self.best:
                self.best, self.best_student = accuracy, digits.clone(self.student)
            if self.disk:
                self.curve.append(self._guide_by_correctness())
        self.watching += time.perf_counter() - start  # what only the report needs is not the method's time

    def _guide_by_correctness(self) -> dict[str, float]:
        """Mean g and discount over right and over wrong training samples."""
        terms = self.guide_terms()
        right = terms.correct.bool()
        values = {}
        for name, value in {"g": terms.guide, "discount": terms.discount}.items():
            values |= {f"{name}, right": value[right].mean().item(), f"{name}, wrong": value[~right].mean().item()}
        return values

    def guide_terms(self) -> functional.DiSKTerms:
        """Evaluate guide and student on the training split, sample by sample."""
        train = self.data.splits["train"]
        self.disk.eval()
        with torch.no_grad():
            terms = self.disk.terms(
                self.student(train.x), self.data.logits, train.y, self.data.features, reduction="none"
            )
        self.disk.train()
        return terms

    def test_accuracies(self) -> tuple[float, float]:
        """Accuracy at the last epoch, and at the epoch of best validation accuracy: the only look at the test split."""
        test = self.data.splits["test"]
        return digits.accuracy(self.student, test), digits.accuracy(self.best_student, test)


def trials(method: str) -> list[dict[str, Any]]:
    """Return what to try: the whole grid for KD, as many random draws for DiSK; CE has nothing to set."""
    if method == "CE":
        return [{}]
    grid = [{"ce_weight": a, "temperature": t} for a, t in itertools.product(CE_WEIGHTS, TEMPERATURES)]
    if method == "KD":
        return grid
    rng = random.Random(0)
    wide = [
        settings | {"budget": budget, "top_k": top_k, "teacher_target": target}
        for settings in grid
        for budget in BUDGETS
        for top_k, target in SCAFFOLDS
    ]
    return rng.sample(wide, TRIALS)


def search(data: Data) -> dict[str, Any]:
    """Pick each method's settings by mean validation accuracy at the last epoch."""
    chosen = {}
    with tqdm(total=sum(len(trials(method)) for method in METHODS) * len(SEARCH_SEEDS), desc="search") as bar:
        for method in METHODS:
            scored = []
            for settings in trials(method):
                scores = []
                for seed in SEARCH_SEEDS:
                    scores.append(Run(data, method, settings, seed, report=False).validation)
                    bar.update()
                scored.append((sum(scores) / len(scores), settings))
            best = max(scored, key=lambda entry: entry[0])
            chosen[method] = {"trials": len(scored), "validation": best[0], "settings": best[1]}
    return chosen


def compare(data: Data, chosen: dict[str, Any], seeds: int) -> tuple[dict[str, Any], dict[str, list[Run]]]:
    """Train every method from every seed and summarise."""
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    with tqdm(total=seeds * len(METHODS), desc="students") as bar:
        for seed, method in itertools.product(range(seeds), METHODS):
            runs[method].append(Run(data, method, chosen[method]["settings"], seed, report=True))
            bar.update()
    results: dict[str, Any] = {
        "protocol": {
            "data": {name: len(split.y) for name, split in data.splits.items()},
            "passes": data.passes,
            "seeds": seeds,
            "teacher_test": digits.accuracy(data.teacher.model, data.splits["test"]),
            "student_parameters": sum(p.numel() for p in digits.make_student().parameters()),
            "search": chosen,
        },
        "methods": {},
    }
    for method, entries in runs.items():
        last, best = zip(*(run.test_accuracies() for run in entries), strict=True)
        extra = sum(p.numel() for p in entries[0].disk.parameters()) if entries[0].disk else 0
        results["methods"][method] = {
            "test_last_epoch": summary(last),
            "test_best_validation_epoch": summary(best),
            "seconds": sum(run.seconds for run in entries) / seeds,
            "extra_training_parameters": extra,
        }
    results["disk_minus_kd"] = paired_difference(results["methods"])
    return results, runs


def summary(values) -> dict[str, Any]:
    """Mean, standard deviation and the values themselves."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": tensor.mean().item(), "std": tensor.std().item(), "values": list(values)}


def paired_difference(methods: dict[str, Any]) -> dict[str, Any]:
    """DiSK - KD at the last epoch, seed by seed, with a 95 % t-interval and what it says."""
    pairs = zip(*(methods[name]["test_last_epoch"]["values"] for name in ("DiSK", "KD")), strict=True)
    difference = summary([disk - kd for disk, kd in pairs])
    count = len(difference["values"])
    half = difference["std"] / count**0.5 * stats.t.ppf(0.975, count - 1)
    low, high = difference["mean"] - half, difference["mean"] + half
    verdict = "no difference between DiSK and KD can be told from these seeds"
    if low > 0:
        verdict = "DiSK is better than KD"
    elif high < 0:
        verdict = "DiSK is worse than KD"
    return difference | {"interval_95": [low, high], "verdict": verdict}


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table with the verdict below."""
    lines = [
        "| method | test accuracy, last epoch | at best validation epoch | seconds | extra training parameters |",
        "|---|---|---|---|---|",
    ]
    for method, row in results["methods"].items():
        last, best = row["test_last_epoch"], row["test_best_validation_epoch"]
        lines.append(
            f"| {method} | {last['mean']:.2f} ± {last['std']:.2f} | {best['mean']:.2f} ± {best['std']:.2f} | "
            f"{row['seconds']:.1f} | {row['extra_training_parameters']:,} |"
        )
    difference = results["disk_minus_kd"]
    low, high = difference["interval_95"]
    protocol = results["protocol"]
    lines += [
        "",
        f"DiSK - KD, paired: {difference['mean']:+.2f} (95 % interval {low:+.2f} to {high:+.2f}): "
        f"{difference['verdict']}.",
        f"Teacher {protocol['teacher_test']:.2f}; student {protocol['student_parameters']} parameters; "
        f"{protocol['seeds']} seeds; {protocol['passes']['warm']} warm-up and {protocol['passes']['student']} student "
        f"passes for every method.",
    ]
    return "\n".join(lines)


def figure(results: dict[str, Any], runs: dict[str, list[Run]], data: Data, path: Path) -> None:
    """Draw accuracy, the guide over the epochs, and the digits with the largest discount."""
    fig = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = fig.subfigures(1, 3)
    axes = left.subplots()
    rows = [results["methods"][method]["test_last_epoch"] for method in METHODS]
    axes.errorbar(METHODS, [row["mean"] for row in rows], [row["std"] for row in rows], fmt="o", capsize=6)
    axes.set(ylabel="test accuracy, last epoch (%)", title="mean ± std over seeds")
    axes.margins(x=0.3)
    axes = middle.subplots()
    epochs = range(1, data.passes["student"] + 1)
    for name, style in {
        "g, right": "C0-",
        "g, wrong": "C0--",
        "discount, right": "C1-",
        "discount, wrong": "C1--",
    }.items():
        values = torch.tensor([[entry[name] for entry in run.curve] for run in runs["DiSK"]])
        axes.plot(epochs, values.nanmean(0), style, label=name)
    axes.set(xlabel="epoch", title="guide on right and wrong samples", ylim=(0, 1))
    middle.legend(loc="outside lower center", ncols=2)
    discount = runs["DiSK"][0].guide_terms().discount
    grid = right.subplots(4, 4)
    right.suptitle("largest discount: label, discount")
    train = data.splits["train"]
    for axes, index in zip(grid.flat, discount.topk(16).indices.tolist(), strict=True):
        axes.imshow(train.x[index].reshape(8, 8), cmap="gray_r")
        axes.set_title(f"{train.y[index].item()}, {discount[index]:.2f}", fontsize=7)
        axes.axis("off")
    fig.savefig(path, dpi=110)


def main() -> None:
    """Parse the flags, train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="a few passes and two seeds, to see it run")
    parser.add_argument("--search", action="store_true", help=f"search the settings again and write {SEARCH_FILE.name}")
    parser.add_argument("--seeds", type=int, default=5, help="students per method, at least 2 (default 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for quickstart.json and .png")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for an interval, got {args.seeds}")
    torch.set_num_threads(1)  # faster for matrices this small, and the same sums on any number of cores
    data = Data(dry_run=args.dry_run)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.search:
        SEARCH_FILE.write_text(json.dumps(search(data), indent=1) + "\n")
    chosen = json.loads(SEARCH_FILE.read_text())
    results, runs = compare(data, chosen, 2 if args.dry_run else args.seeds)
    print(table(results))
    (args.out / "quickstart.json").write_text(json.dumps(results, indent=1) + "\n")
    figure(results, runs, data, args.out / "quickstart.png")
    print(f"wrote {args.out / 'quickstart.json'} and {args.out / 'quickstart.png'}")


if __name__ == "__main__":
    main()
