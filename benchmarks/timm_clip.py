"""The factor of the student's gradient under clipping by one global norm that includes DiSK's guide.

timm clips all parameters of the trainable module together. A student whose own gradient has norm s is scaled by min(1,
clip / s); together with a guide's gradient of norm g by min(1, clip / sqrt(s^2 + g^2)). Shown for each multiplier: the
median of both factors over the steps of a short training, with the guide's whole gradient, with its gradient without
the budget's term, and with the parameters of ``DiSKTask.get_clip_parameters``.

A synthetic problem: 100 classes of noisy 32 px images, a trained test_resnet as teacher.

Usage: python benchmarks/timm_clip.py [--clip NORM] [--steps N] [--dry-run]
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import trange

from disk_plugin.integrations.timm import DiSKTask

CLASSES, SIZE, NOISE = 100, 32, 2.5


class Images:
    """Noisy copies of one random pattern per class."""

    def __init__(self) -> None:
        self.patterns = torch.randn(CLASSES, 3, 4, 4)

    def batch(self, samples: int = 64) -> tuple[Tensor, Tensor]:
        """Draw images (N, 3, 32, 32) and their classes."""
        target = torch.randint(CLASSES, (samples,))
        return interpolate(self.patterns[target], size=SIZE) + NOISE * torch.randn(samples, 3, SIZE, SIZE), target


def trained_teacher(images: Images, steps: int) -> nn.Module:
    """Train the teacher with cross-entropy."""
    teacher = timm.create_model("test_resnet", num_classes=CLASSES)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    for _ in trange(steps, leave=False):
        image, target = images.batch()
        loss = cross_entropy(teacher(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher


def length_of(gradients: Iterable[Tensor]) -> float:
    """Length of all of them together."""
    return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def norm(parameters: list[nn.Parameter]) -> float:
    """Global norm of the gradients."""
    return length_of(p.grad for p in parameters if p.grad is not None)


def factors(
    teacher: nn.Module, images: Images, *, multiplier: float, scale: float | None, clip: float, steps: int
) -> dict[str, float]:
    """Train and clip as the host does; return the median factor of the student's gradient in each case."""
    torch.manual_seed(1)
    student = timm.create_model("test_efficientnet", num_classes=CLASSES)
    dual = {"multiplier": (multiplier, multiplier)}
    settings = {"guide_gradient_scale": scale, "input_size": (3, SIZE, SIZE), "verbose": False}
    task = DiSKTask(student, teacher, epochs=1, dual=dual, **settings)
    guide = list(task.disk.guide.parameters())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    seen: dict[str, list[float]] = {"student alone": [], "as it comes": [], "without the budget": [], "DiSKTask": []}
    for _ in trange(steps, leave=False):
        image, target = images.batch()
        without = _guide_norm_without_budget(task, image, target, guide)
        optimizer.zero_grad()
        task(image, target)["loss"].backward()
        own, guides = norm(list(task.student.parameters())), norm(guide)
        list(task.get_clip_parameters())
        for name, other in zip(seen, (0.0, guides, without, norm(guide)), strict=True):
            seen[name].append(min(1.0, clip / (own**2 + other**2) ** 0.5))
        nn.utils.clip_grad_norm_(task.get_trainable_module().parameters(), clip)
        optimizer.step()
    return {name: statistics.median(values) for name, values in seen.items()}


def _guide_norm_without_budget(task: DiSKTask, image: Tensor, target: Tensor, guide: list[nn.Parameter]) -> float:
    """Return the norm of the guide's gradient for the same batch within the budget, with the same scaling."""
    budget = task.disk.budget.clone()
    task.disk.budget.fill_(1e6)
    task.disk.eval()  # not counted in the epoch's statistics
    loss = task(image, target)["loss"]
    task.disk.budget.copy_(budget)
    task.disk.train()
    gradients = torch.autograd.grad(loss, guide)
    return length_of(gradients)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="folder for timm_clip.json")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    steps = 3 if args.dry_run else args.steps
    torch.manual_seed(0)
    images = Images()
    teacher = trained_teacher(images, steps=3 if args.dry_run else 300)
    rows = []
    for scale in (0.3, None):
        for multiplier in (0.1, 5.0, 50.0):
            found = factors(teacher, images, multiplier=multiplier, scale=scale, clip=args.clip, steps=steps)
            rows.append({"guide_gradient_scale": scale, "multiplier": multiplier, **found})
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:.3f}" if k in names[2:] else str(v) for k, v in row.items()) + " |")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "timm_clip.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
