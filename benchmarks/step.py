"""Training steps with DiSK against KD's, ResNet32x4 -> ResNet8x4, 32x32 images, 100 classes, random data.

A step is the teacher's forward, the student's forward and backward, the loss and SGD. The joint objective is timed per
step. Algorithm 1 is timed per outer iteration, three student passes over a few batches, against three of KD:

- replay: the third pass is recorded, then ``GuideReplay`` trains the guide for three passes;
- alternation: three guide passes first, each running teacher and student once more;
- the authors' loop: besides three student and three guide passes, two passes of teacher and student whose outputs are
  unused. A model of its cost with our guide, which is smaller than theirs.

KD and DKD are computed as in mdistiller, but run the teacher first, as ours does: on a CPU that is the faster order.
``--mdistiller CHECKOUT`` also times its own distillers, with its own models, against DiSK registered with it.

Usage: python benchmarks/step.py [--pairs N] [--batches N] [--mdistiller CHECKOUT] [--device D] [--out DIR] [--dry-run]
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cifar_resnets import CifarResNet
from distillation import dkd_loss, kd_loss
from pairs import compare, keep, results, row, table
from torch import Tensor, nn

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.replay import GuideReplay
from disk_plugin.taps import with_features
from disk_plugin.training import guide_pass
from disk_plugin.uniform import UniformGuide

PASSES = 3  # of the student in an outer iteration
BARS = {"joint DiSK": 1.05, "UniformGuide": 1.02, "Algorithm 1, replay": 1.10}
DISCOUNT = 0.4  # fixed: "auto" would be 0 in so few batches

Batches = list[tuple[Tensor, Tensor]]


def sgd(parameters: Any) -> torch.optim.SGD:
    """The optimizer of everything."""
    return torch.optim.SGD(list(parameters), lr=0.05, momentum=0.9, weight_decay=5e-4)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make a step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class KD:
    """Distillation by a loss (student_logits, teacher_logits, target)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: Callable[..., Tensor] = kd_loss) -> None:
        self.student, self.teacher, self.loss = copy.deepcopy(student), copy.deepcopy(teacher).eval(), loss
        self.optimizer = sgd(self.student.parameters())

    def run(self, batches: Batches) -> None:
        """Make one pass."""
        for image, target in batches:
            with torch.no_grad():
                teacher_logits = self.teacher(image)
            update(self.optimizer, self.loss(self.student(image), teacher_logits, target))


class DiSK:
    """Distillation by DiSK: jointly, or in Algorithm 1's passes."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = copy.deepcopy(student), with_features(copy.deepcopy(teacher).eval())
        guide = GuideHead(teacher.classifier.out_features, self.teacher.feature_dim)
        self.disk = DiSKLoss(guide, discount=DISCOUNT).to(teacher.classifier.weight.device)
        self.joint = sgd([*self.student.parameters(), *self.disk.parameters()])
        self.of_student, self.of_guide = sgd(self.student.parameters()), sgd(self.disk.parameters())
        self.replay = GuideReplay(self.disk, self.of_guide)

    def run(self, batches: Batches) -> None:
        """Make one pass of student and guide together."""
        for image, target in batches:
            logits, features = self._teach(image)
            update(self.joint, self.disk(self.student(image), logits, target, features))

    def student_pass(self, batches: Batches, *, record: bool = False) -> None:
        """Train the student alone."""
        for image, target in batches:
            logits, features = self._teach(image)
            student_logits = self.student(image)
            if record:
                loss = self.replay.student_loss(student_logits, logits, target, features)
            else:
                with torch.no_grad():
                    guide_logits = self.disk.guide_logits(logits, features)
                loss = self.disk.terms(student_logits, logits, target, guide_logits=guide_logits).student_loss
            update(self.of_student, loss)

    def guide_pass(self, batches: Batches) -> None:
        """Train the guide alone; the student is fixed, its BatchNorm statistics included."""
        self.student.eval()
        guide_pass(self.of_guide, batches, self._guide_loss)
        self.student.train()

    def dead_pass(self, batches: Batches) -> None:
        """Run the models and discard the outputs."""
        with torch.no_grad():
            for image, _ in batches:
                self._teach(image)
                self.student(image)

    def _guide_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        image, target = batch
        logits, features = self._teach(image)
        with torch.no_grad():
            student_logits = self.student(image)
        return self.disk.terms(student_logits, logits, target, features).guide_loss

    @torch.no_grad()
    def _teach(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.teacher(image)


def replay(ours: DiSK, batches: Batches) -> None:
    """Algorithm 1's outer iteration on a record."""
    for student_pass in range(PASSES):
        ours.student_pass(batches, record=student_pass == PASSES - 1)
    ours.replay.train_guide(passes=PASSES)


def alternation(ours: DiSK, batches: Batches) -> None:
    """Algorithm 1's outer iteration, unmodified."""
    for _ in range(PASSES):
        ours.guide_pass(batches)
    for _ in range(PASSES):
        ours.student_pass(batches)


def authors_loop(ours: DiSK, batches: Batches) -> None:
    """The authors' outer iteration."""
    alternation(ours, batches)
    for _ in range(2):
        ours.dead_pass(batches)


class Setting(NamedTuple):
    """What all methods share."""

    models: tuple[str, str]
    batch_size: int
    batches: int
    pairs: int
    device: str

    def data(self) -> Batches:
        """Draw images and labels."""
        size = (self.batch_size, 3, 32, 32)
        drawn = [(torch.randn(size), torch.randint(100, (self.batch_size,))) for _ in range(self.batches)]
        return [(image.to(self.device), target.to(self.device)) for image, target in drawn]


def measured(setting: Setting) -> list[dict[str, Any]]:
    """Compare single steps, then outer iterations."""
    teacher, student = (CifarResNet(name).to(setting.device) for name in setting.models)
    batches = setting.data()
    kd, dkd = KD(student, teacher), KD(student, teacher, dkd_loss)
    ours = DiSK(student, teacher)
    uniform = KD(student, teacher, DiSKLoss(UniformGuide(discount=DISCOUNT)).to(setting.device))
    rows = []
    for name, method in {"joint DiSK": ours, "UniformGuide": uniform, "DKD": dkd}.items():
        ratio = compare(partial(method.run, batches[:1]), partial(kd.run, batches[:1]), pairs=setting.pairs)
        rows.append(row(f"a step: {name} / KD", ratio, BARS.get(name)))
    loops = {"Algorithm 1, replay": replay, "Algorithm 1, alternation": alternation, "the authors' loop": authors_loop}
    for name, loop in loops.items():
        theirs = partial(kd.run, PASSES * batches)
        ratio = compare(partial(loop, ours, batches), theirs, pairs=setting.pairs, warmup=1)
        rows.append(row(f"{PASSES} student passes: {name} / KD", ratio, BARS.get(name)))
    return rows


def of_mdistiller(checkout: Path, setting: Setting) -> list[dict[str, Any]]:
    """Compare DiSK in a checkout of mdistiller with its own KD and DKD: its classes, its models, its settings."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(checkout))
    from disk_plugin.integrations.mdistiller import register

    register()
    from mdistiller.distillers import distiller_dict
    from mdistiller.engine.cfg import CFG
    from mdistiller.models import cifar_model_dict

    teacher, student = (cifar_model_dict[name][0](num_classes=100) for name in setting.models)
    image, target = setting.data()[0]

    def stepper(kind: str) -> Callable[[], None]:
        distiller = distiller_dict[kind](copy.deepcopy(student), copy.deepcopy(teacher), CFG).to(setting.device)
        optimizer, _ = sgd(distiller.get_learnable_parameters()), distiller.train()

        def step() -> None:
            _, losses = distiller(image=image, target=target, epoch=1)
            update(optimizer, sum(loss.mean() for loss in losses.values()))

        return step

    steps = {kind: stepper(kind) for kind in ("DISK", "KD", "DKD")}
    return [
        row(f"a step: DISK in mdistiller / its {kind}", compare(steps["DISK"], steps[kind], pairs=setting.pairs))
        for kind in ("KD", "DKD")
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batches", type=int, default=2, help="in a pass")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--mdistiller", type=Path, metavar="CHECKOUT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for step.json")
    parser.add_argument("--dry-run", action="store_true", help="small models and batches, six pairs")
    args = parser.parse_args()
    setting = Setting(("resnet32x4", "resnet8x4"), args.batch_size, args.batches, args.pairs, args.device)
    if args.dry_run:
        setting = Setting(("resnet8x4", "resnet8x4"), 2, 1, 6, args.device)
    torch.manual_seed(0)
    rows = measured(setting)
    if args.mdistiller is None:
        print("mdistiller's own distillers are skipped: --mdistiller names no checkout")
    else:
        rows += of_mdistiller(args.mdistiller, setting)
    about = f"{' -> '.join(setting.models)}, batch {setting.batch_size}, {setting.batches} batches in a pass"
    found = results(rows, about, args.device)
    print(table(found))
    keep(found, args.out, "step")


if __name__ == "__main__":
    main()
