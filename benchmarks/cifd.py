"""CIFD's cost: its modules fitted together against one alone, and a student's step against plain KD.

Stage A: an epoch over a teacher cache of random embeddings, as wide as ResNet10-l's. Stage B: a step of
resnet32x4 -> resnet8x4 with the teacher's outputs at hand, as from a cache; the modules run in the step.

Usage: python benchmarks/cifd.py [--pairs N] [--samples N] [--batch-size N] [--device cuda] [--out DIR] [--dry-run]
"""

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cifar_resnets import CifarResNet
from distillation import kd_loss
from pairs import compare, keep, results, row, table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.cache import SeededViews, TeacherCache
from disk_plugin.features import CIFD, Guided, Outputs
from disk_plugin.features.cifd import RateDistortionModule, fit_rdms
from disk_plugin.taps import with_features

R = (1e4, 5e3, 1e3)
WIDTH, STUDENT_WIDTH = 256, 256  # of the embeddings of both ResNets here


def cached(folder: str, samples: int) -> TeacherCache:
    """Write a cache of random embeddings that are >= 0, as after a ReLU and pooling."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 100))
    dataset = TensorDataset(torch.randn(samples, 32), torch.arange(samples) % 100)
    return TeacherCache.write(folder, teacher, SeededViews(dataset, views=1), progress=False)


def fitting(cache: TeacherCache, batch_size: int, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return an epoch of three modules and one of a single one."""
    how = {"targets": torch.arange(cache.samples) % 100, "epochs": 1, "batch_size": batch_size, "progress": False}

    def of(weights: tuple[float, ...]) -> Callable[[], object]:
        modules = RateDistortionModule(WIDTH, 100, distortion_weights=weights)
        return partial(fit_rdms, cache, modules=modules, device=device, **how)

    return of(R), of(R[-1:])


def steps(batch_size: int, device: str) -> dict[str, Callable[[], object]]:
    """Return a step of plain KD, of CIFD and of CIFD guided by DiSK."""
    torch.manual_seed(0)
    student = CifarResNet("resnet8x4").to(device)
    image, target = torch.randn(batch_size, 3, 32, 32, device=device), torch.randint(100, (batch_size,), device=device)
    teacher = Outputs(torch.randn(batch_size, 100, device=device), torch.rand(batch_size, WIDTH, device=device))
    rdms = RateDistortionModule(WIDTH, 100, distortion_weights=R)
    found: dict[str, Callable[[], object]] = {}

    def add(name: str, loss: Callable[[Outputs], Tensor], *parts: nn.Module) -> None:
        own = with_features(copy.deepcopy(student))
        parameters = [each for part in (own, *parts) for each in part.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

        def step() -> None:
            logits, features = own(image)
            optimizer.zero_grad()
            loss(Outputs(logits, features, head=own.head)).backward()
            optimizer.step()

        found[name] = step

    add("KD", lambda shown: kd_loss(shown.logits, teacher.logits, target))
    cifd = CIFD(STUDENT_WIDTH, WIDTH, rdms=copy.deepcopy(rdms), allow_unfitted=True).to(device)
    add("CIFD", lambda shown: torch.stack([each.mean() for each in cifd(shown, teacher, target).values()]).sum(), cifd)
    own = CIFD(STUDENT_WIDTH, WIDTH, rdms=copy.deepcopy(rdms), allow_unfitted=True)
    guided = Guided(DiSKLoss(GuideHead(100, WIDTH)), own).to(device)
    add("DiSK + CIFD", lambda shown: guided(shown, teacher, target), guided)
    return found


def main() -> None:
    """Time them, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="few samples, six pairs")
    args = parser.parse_args()
    pairs, samples, batch = (6, 128, 4) if args.dry_run else (args.pairs, args.samples, args.batch_size)
    warnings.filterwarnings("ignore", "the module with R")  # random embeddings have no classes
    with tempfile.TemporaryDirectory() as folder:
        ratio = compare(*fitting(cached(folder, samples), 256, args.device), pairs=pairs, warmup=1)
    rows = [row("stage A: 3 modules / 1 module", ratio, 1.3)]
    made = steps(batch, args.device)
    for name, bar in (("CIFD", 1.1), ("DiSK + CIFD", None)):
        rows.append(row(f"stage B: {name}, 3 modules / KD", compare(made[name], made["KD"], pairs=pairs), bar))
    setting = f"embeddings of width {WIDTH}, {samples} of them; resnet32x4 -> resnet8x4, batch {batch}"
    found = results(rows, setting, args.device)
    print(table(found))
    keep(found, args.out, "cifd")


if __name__ == "__main__":
    main()
