"""Which classes to scaffold: the measurement behind the default ``top_k=None``.

A synthetic problem with a wide gap: 100 classes of three Gaussian clusters each in 16 dimensions, which the teacher
solves and the student (12 hidden units) cannot. CE, KD at several temperatures and weights, and DiSK under several
choices of the scaffolded classes and of the teacher's target outside them, all from the same CE-trained student with
the same number of passes; accuracy is on validation data, as this is a choice of settings, not a result.

Usage: python examples/scaffold_target.py [--dry-run] [--seeds N] [--out DIR]
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.schedule import estimate_budget
from disk_plugin.taps import with_features
from disk_plugin.variants import VARIANTS

CLASSES, CLUSTERS, DIM, HELD_OUT = 100, 3, 16, 1000
SPREAD, NOISE = 1.3, 0.55  # standard deviations of the clusters' centres, and around them
SCAFFOLDED = VARIANTS["paper"]._replace(teacher_target="scaffolded")
PAPERS = {"ce_weight": 0.1, "temperature": 4.0}  # of every row with a budget, unless it sets them
ROWS: dict[str, dict[str, Any]] = {
    "CE": {"method": "CE"},
    **{
        f"KD, temperature {temperature:g}, ce_weight {weight:g}": {
            "method": "KD",
            "temperature": temperature,
            "ce_weight": weight,
            "distill_weight": 1 - weight,
        }
        for temperature in (1.0, 2.0, 4.0)
        for weight in (0.1, 0.5)
    },
    "DiSK, default (discount)": {"method": "default"},
    "DiSK, all classes": {"method": "DiSK"},
    "DiSK, top-20, full target (paper)": {"method": "DiSK", "top_k": 20},
    "DiSK, top-5, full target": {"method": "DiSK", "top_k": 5},
    "DiSK, top-20, target zeroed outside": {"method": "DiSK", "top_k": 20, "variant": SCAFFOLDED},
    "DiSK, top-5, target zeroed outside": {"method": "DiSK", "top_k": 5, "variant": SCAFFOLDED},
    "DiSK, all classes, no schedule (multiplier 50)": {"method": "DiSK", "scheduled": False},
    "DiSK, all classes, guide_gradient_scale=None": {"method": "DiSK", "guide_gradient_scale": None},
}


def draw_centres(count: int, generator: torch.Generator) -> Tensor:
    """Draw the clusters' centres, (count, DIM)."""
    return torch.randn(count, DIM, generator=generator) * SPREAD


def draw_samples(centres: Tensor, classes: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw samples (count, DIM) from clusters assigned to the classes, and their labels."""
    cluster = torch.randint(len(centres), (count,), generator=generator)
    noise = torch.randn(count, DIM, generator=generator) * NOISE
    return centres[cluster] + noise, cluster % classes


class Problem:
    """Training and validation data, a teacher and its outputs, a CE-trained student."""

    def __init__(self, *, dry_run: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        centres = draw_centres(CLASSES * CLUSTERS, generator)
        self.train = draw_samples(centres, CLASSES, 600 if dry_run else 6000, generator)
        self.validation = draw_samples(centres, CLASSES, 3000, generator)
        self.passes = 2 if dry_run else 24
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(DIM, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, CLASSES))
        self.fit(teacher, lambda model, x, y, index: F.cross_entropy(model(x), y))
        self.teacher = with_features(teacher.eval())
        with torch.no_grad():
            self.logits, self.features = self.teacher(self.train[0])

    def fit(self, model, loss_of, parameters=(), after_epoch=lambda: None, seed: int = 0) -> None:
        """SGD .1, momentum .9, cosine."""
        x, y = self.train
        optimizer = torch.optim.SGD([*model.parameters(), *parameters], lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.passes)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.passes):
            for index in torch.randperm(len(y), generator=generator).split(200):
                loss = loss_of(model, x[index], y[index], index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
            after_epoch()

    def warm_student(self, seed: int) -> nn.Module:
        """Train a student with cross-entropy."""
        torch.manual_seed(seed)
        student = nn.Sequential(nn.Linear(DIM, 12), nn.ReLU(), nn.Linear(12, CLASSES))
        self.fit(student, lambda model, x, y, index: F.cross_entropy(model(x), y), seed=seed)
        return student

    def accuracy(self, model: nn.Module) -> float:
        """Return the validation accuracy, percent."""
        x, y = self.validation
        with torch.no_grad():
            return 100 * (model(x).argmax(1) == y).float().mean().item()


def train(problem: Problem, warm: nn.Module, seed: int, method: str, scheduled: bool = True, **settings: Any):
    """Train one student from its warm start; return its accuracy, usage / budget and the spread of g."""
    student = copy.deepcopy(warm)
    if method in {"CE", "KD"}:
        weights = {"ce_weight": 1.0, "distill_weight": 0.0} if method == "CE" else {}
        problem.fit(
            student,
            lambda model, x, y, i: functional.kd_loss(model(x), problem.logits[i], y, **weights, **settings),
            seed=seed,
        )
        return problem.accuracy(student), None, None
    torch.manual_seed(seed)
    guide = GuideHead(CLASSES, problem.teacher.feature_dim)
    held_out = tuple(part[:HELD_OUT] for part in problem.validation)
    if method == "default":
        disk = DiSKLoss(guide, **settings)
        dual = DualScheduler(disk, epochs=problem.passes)
    else:
        disk = DiSKLoss(guide, budget=estimate_budget(student, [held_out]), **{**PAPERS, **settings})
        dual = DualScheduler(disk, epochs=problem.passes, period=max(problem.passes // 2, 1)) if scheduled else None
    problem.fit(
        student,
        lambda model, x, y, i: disk(model(x), problem.logits[i], y, problem.features[i]),
        disk.parameters(),
        dual.step if dual else lambda: None,
        seed,
    )
    disk.eval()
    with torch.no_grad():
        terms = disk.terms(
            student(problem.train[0]), problem.logits, problem.train[1], problem.features, reduction="none"
        )
    usage = None if method == "default" else (terms.usage.mean() / disk.budget).item()
    return problem.accuracy(student), usage, terms.guide.std().item()


def table(results: dict[str, Any]) -> str:
    """Return one Markdown row per setting, with its values per seed."""
    lines = ["| setting | validation accuracy, per seed | usage / budget | std of g |", "|---|---|---|---|"]
    for name, row in results["rows"].items():
        cells = []
        for key, digits in {"accuracy": 1, "usage_over_budget": 2, "std_of_g": 3}.items():
            cells.append(" / ".join(f"{value:.{digits}f}" for value in row[key] if value is not None))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    warm = " / ".join(f"{value:.1f}" for value in results["warm_start"])
    return "\n".join([*lines, "", f"Teacher {results['teacher']:.1f}; warm start {warm}."])


def main() -> None:
    """Parse the flags, run every row from every seed, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="a tenth of the data, two passes, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/scaffold_target"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem, seeds = Problem(dry_run=args.dry_run), range(1 if args.dry_run else args.seeds)
    warm = [problem.warm_student(seed) for seed in seeds]
    results: dict[str, Any] = {
        "teacher": problem.accuracy(problem.teacher.model),
        "warm_start": [problem.accuracy(student) for student in warm],
        "rows": {},
    }
    for name, settings in tqdm(ROWS.items(), desc="settings"):
        accuracy, usage, spread = zip(*(train(problem, warm[seed], seed, **settings) for seed in seeds), strict=True)
        results["rows"][name] = {"accuracy": accuracy, "usage_over_budget": usage, "std_of_g": spread}
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaffold_target.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
