"""Is the guide alive, and is it near its optimum? Two checks on the digits problem.

1. One SGD (lr .1, momentum .9) over student and guide, multiplier .1 to 50 in two periods, budget by the paper's
heuristic: the usage at the end of the last period, against the budget, and the spread of g over samples; also for
``guide_gradient_scale=None``, the gradient w.r.t. the logit. 2. A frozen student: the guide trained alone until the end
of the schedule, against the exact per-sample optimum for the multiplier under which that optimum spends the budget.

Usage: python examples/guide_health.py [--dry-run] [--seeds N] [--out DIR]
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import digits
import torch
from scipy import stats
from torch import nn
from tqdm import tqdm

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.schedule import estimate_budget
from disk_plugin.taps import FeatureTap, with_features

JOINT, PLAIN, FROZEN = "default", "`guide_gradient_scale=None`", "frozen student"

PAPERS = {"ce_weight": 0.1, "temperature": 4.0}


class Problem:
    """The splits, the teacher and its outputs on the training split."""

    def __init__(self, *, dry_run: bool) -> None:
        self.passes = 4 if dry_run else 80
        self.warm_passes = 3 if dry_run else 30
        self.splits = digits.splits()
        self.train = self.splits["train"]
        self.teacher: FeatureTap = with_features(digits.trained_teacher(self.train, 3 if dry_run else 40))
        with torch.no_grad():
            self.logits, self.features = self.teacher(self.train.x)

    def warm_student(self, seed: int) -> nn.Module:
        """Train a student with cross-entropy."""
        return digits.warm_student(self.train, self.warm_passes, seed)

    def make_loss(self, student: nn.Module, seed: int, **settings: Any) -> tuple[DiSKLoss, DualScheduler]:
        """Build the loss with the paper's budget and the scheduler with two periods."""
        torch.manual_seed(seed)
        budget = estimate_budget(student, [self.splits["validation"]])
        disk = DiSKLoss(
            GuideHead(digits.NUM_CLASSES, self.teacher.feature_dim), budget=budget, **{**PAPERS, **settings}
        )
        return disk, DualScheduler(disk, epochs=self.passes, multiplier=(0.1, 50.0), period=self.passes // 2)

    @torch.no_grad()
    def terms(self, disk: DiSKLoss, student: nn.Module) -> functional.DiSKTerms:
        """Evaluate the training split, per sample."""
        disk.eval()
        terms = disk.terms(student(self.train.x), self.logits, self.train.y, self.features, reduction="none")
        disk.train()
        return terms


def joint(problem: Problem, seed: int, guide_gradient_scale: dict[str, Any]) -> dict[str, float]:
    """Train student and guide with one SGD; report the guide at the end of the last period."""
    student = problem.warm_student(seed)
    disk, dual = problem.make_loss(student, seed, **guide_gradient_scale)
    violated: list[bool] = []

    def loss_of(model, x, y, index):
        terms = disk.terms(model(x), problem.logits[index], y, problem.features[index])
        violated.append(bool(terms.usage > disk.budget))
        return terms.loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        digits.train(
            student,
            problem.train,
            problem.passes,
            seed,
            loss_of,
            extra_parameters=disk.parameters(),
            after_epoch=lambda epoch: dual.step(),
        )
    terms = problem.terms(disk, student)
    last = violated[-(len(violated) // problem.passes) :]
    return {
        "budget": disk.budget.item(),
        "usage": terms.usage.mean().item(),
        "usage_over_budget": (terms.usage.mean() / disk.budget).item(),
        "guide_mean": terms.guide.mean().item(),
        "guide_std": terms.guide.std().item(),
        "discount_mean": terms.discount.mean().item(),
        "violated_batches_last_epoch": sum(last) / len(last),
        "warned_dead": any("dead" in str(entry.message) for entry in caught),
    }


def against_optimum(problem: Problem, seed: int) -> dict[str, float]:
    """Train the guide alone on a frozen student and compare it with the exact optimum, sample by sample."""
    student = problem.warm_student(seed).eval()
    disk, dual = problem.make_loss(student, seed)
    with torch.no_grad():
        student_logits = student(problem.train.x)
    digits.train(
        disk.guide,
        problem.train,
        problem.passes,
        seed,
        lambda _, x, y, i: disk.terms(student_logits[i], problem.logits[i], y, problem.features[i]).guide_loss,
        after_epoch=lambda epoch: dual.step(),
    )
    terms = problem.terms(disk, student)
    price = functional.optimal_multiplier(student_logits, problem.logits, problem.train.y, budget=disk.budget.item())
    optimum = functional.optimal_guide(student_logits, problem.logits, problem.train.y, multiplier=price)
    guided = functional.usage(student_logits, problem.train.y, torch.logit(optimum))
    return {
        "pearson": float(stats.pearsonr(terms.guide, optimum).statistic),
        "spearman": float(stats.spearmanr(terms.guide, optimum).statistic),
        "budget": disk.budget.item(),
        "usage_of_guide": terms.usage.mean().item(),
        "usage_of_optimum": guided.item(),
        "multiplier_of_optimum": price.item(),
        "guide_mean": terms.guide.mean().item(),
        "optimum_mean": optimum.mean().item(),
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return the range over the seeds as Markdown: both joint runs, then the guide against the optimum."""

    def between(name: str, key: str) -> str:
        values = [row[key] for row in results[name]]
        return f"{min(values):.2f} to {max(values):.2f}"

    lines = [
        "| one SGD over student and guide | usage / budget | mean g | std of g | warned |",
        "|---|---|---|---|---|",
    ]
    for name in (JOINT, PLAIN):
        warned = sum(row["warned_dead"] for row in results[name])
        cells = [between(name, key) for key in ("usage_over_budget", "guide_mean", "guide_std")]
        lines.append(f"| {name} | {' | '.join(cells)} | {warned} of {len(results[name])} |")
    lines += [
        "",
        f"On a frozen student, trained guide against the exact optimum of each sample: Pearson correlation "
        f"{between(FROZEN, 'pearson')}, Spearman {between(FROZEN, 'spearman')}; mean g "
        f"{between(FROZEN, 'guide_mean')} against {between(FROZEN, 'optimum_mean')}; usage "
        f"{between(FROZEN, 'usage_of_guide')} against {between(FROZEN, 'usage_of_optimum')}, the budget.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the flags, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="a few passes, one seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/guide_health"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem, seeds = Problem(dry_run=args.dry_run), range(1 if args.dry_run else args.seeds)
    checks = {
        JOINT: lambda seed: joint(problem, seed, {}),
        PLAIN: lambda seed: joint(problem, seed, {"guide_gradient_scale": None}),
        FROZEN: lambda seed: against_optimum(problem, seed),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in checks}
    with tqdm(total=len(checks) * len(seeds), desc="guides") as bar:
        for name, check in checks.items():
            for seed in seeds:
                results[name].append(check(seed))
                bar.update()
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "guide_health.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
