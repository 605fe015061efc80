"""A training step of DiSKTask against timm's LogitDistillationTask: same student, teacher, batch, optimizer.

Forward of both models, backward, SGD step; resnet50 -> resnet18, 160 px, 1000 classes, random weights and images.
timm runs the teacher after the student, whose activations are held meanwhile; DiSKTask runs it before. The cost of DiSK
itself is therefore also measured against timm's task with the teacher first.

Usage: python benchmarks/timm_step.py [--pairs N] [--batch-size N] [--dry-run]
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from pairs import compare, keep, results, row, table
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask, TrainingTask
from torch import Tensor
from torch.nn.functional import kl_div

from disk_plugin.integrations.timm import DiSKTask


class TeacherFirst(LogitDistillationTask):
    """timm's task in the other order."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 (timm's name)
        """Evaluate the same loss."""
        with torch.no_grad():
            teacher_logits = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        logits = self.trainable_module(input)
        log_probs, teacher_log_probs = ((each / self.temperature).log_softmax(-1) for each in (logits, teacher_logits))
        kd_loss = kl_div(log_probs, teacher_log_probs, reduction="batchmean", log_target=True) * self.temperature**2
        return {"loss": self.task_loss_weight * self.criterion(logits, target) + self.distill_loss_weight * kd_loss}


def stepper(task: TrainingTask, image: Tensor, target: Tensor) -> Callable[[], None]:
    """Return a training step as a function."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=1e-3, momentum=0.9)
    task.get_trainable_module().train()

    def step() -> None:
        optimizer.zero_grad()
        task(image, target)["loss"].backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--out", type=Path, help="folder for timm_step.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny models and images, six pairs")
    args = parser.parse_args()
    names, size, batch, pairs = ("resnet50", "resnet18"), args.image_size, args.batch_size, args.pairs
    if args.dry_run:
        names, size, batch, pairs = ("test_resnet", "test_efficientnet"), 32, 4, 6
    torch.manual_seed(0)
    teacher, student = (timm.create_model(name, num_classes=1000) for name in names)
    image, target = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    ours = DiSKTask(copy.deepcopy(student), teacher, epochs=100, input_size=image.shape[1:], verbose=False)
    step = stepper(ours, image, target)
    rows = []
    for name, kind in {"timm's task": LogitDistillationTask, "timm's task, teacher first": TeacherFirst}.items():
        theirs = kind(copy.deepcopy(student), teacher, temperature=4.0, verbose=False)
        rows.append(row(f"DiSKTask / {name}", compare(step, stepper(theirs, image, target), pairs=pairs)))
    about = f"{names[0]} -> {names[1]}, {size} px, batch {batch}, timm {timm.__version__}"
    found = results(rows, about)
    print(table(found))
    keep(found, args.out, "timm_step")


if __name__ == "__main__":
    main()
