"""A training step of ScaleKD, guided by DiSK, against timm's FeatureDistillationTask; its view against an explicit DCT.

Forward of both models, backward, SGD step: swin_tiny -> resnet18, 224 px, 1000 classes, random weights and images, with
and without recomputing the activations of the teacher's tail. Memory is what a step stores for its backward pass, each
tensor's storage once, without parameters; on CUDA the allocator's peak.

The view without the maps' mean is a subtraction here and a two-dimensional DCT, a product with its matrix from either
side, in the authors' way: forward and backward of a map (N, 768, 7, 7).

Usage: python benchmarks/scalekd.py [--pairs N] [--batch-size N] [--device D] [--out DIR] [--dry-run]
"""

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import timm
import torch
from timm.task import FeatureDistillationTask, TrainingTask
from timm_step import stepper
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from disk_plugin.features.scalekd import without_dc
from disk_plugin.integrations.timm import DiSKTask

Step = Callable[[], None]
VIEW_BAR, CALLS = 0.1, 20


def stored(step: Step, task: TrainingTask, device: str) -> int:
    """Return the bytes that a step needs beside the models."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    own = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(size for size, _ in seen.values())


def steps(names: tuple[str, str], size: int, batch: int, count: int, device: str) -> tuple[list[Any], dict[str, int]]:
    """Time a step of each task against timm's own; return rows and memory."""
    teacher, student = (timm.create_model(name, num_classes=1000).to(device) for name in names)
    image, target = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)
    how: dict[str, Any] = {"epochs": 100, "input_size": image.shape[1:], "method": "scalekd", "verbose": False}
    how["device"] = torch.device(device)

    def ours(*, checkpoint: bool) -> TrainingTask:
        settings = {"checkpoint_tail": checkpoint}
        return DiSKTask(copy.deepcopy(student), copy.deepcopy(teacher), method_settings=settings, **how)

    theirs = FeatureDistillationTask(
        copy.deepcopy(student), copy.deepcopy(teacher), verbose=False, device=how["device"]
    )
    tasks = {"DiSK + ScaleKD": ours(checkpoint=False), "DiSK + ScaleKD, checkpoint_tail": ours(checkpoint=True)}
    plain, rows = stepper(theirs, image, target), []
    memory = {"FeatureDistillationTask": stored(plain, theirs, device)}
    for name, task in tasks.items():
        step = stepper(task, image, target)
        rows.append(pairs.row(f"{name} / FeatureDistillationTask", pairs.compare(step, plain, pairs=count)))
        memory[name] = stored(step, task, device)
    return rows, memory


def dct_of(size: int, device: str) -> Tensor:
    """Return the orthonormal matrix of the DCT-II."""
    k = torch.arange(size, dtype=torch.float32, device=device)
    rows = torch.cos(math.pi / size * (k.unsqueeze(0) + 0.5) * k.unsqueeze(1)) * (2 / size) ** 0.5
    rows[0] /= 2**0.5
    return rows


def views(shape: tuple[int, ...], count: int, device: str) -> dict[str, Any]:
    """Time the view without the mean against a DCT, forward and backward."""
    feature_map = torch.randn(shape, device=device, requires_grad=True)
    rows, columns, weight = dct_of(shape[2], device), dct_of(shape[3], device), torch.randn(shape, device=device)
    kept = torch.ones(shape[2:], device=device)
    kept[0, 0] = 0

    def by_dct(given: Tensor) -> Tensor:
        return rows.t() @ (kept * (rows @ given @ columns.t())) @ columns

    torch.testing.assert_close(by_dct(feature_map), without_dc(feature_map), rtol=1e-4, atol=1e-4)

    def run(view: Callable[[Tensor], Tensor]) -> Step:
        def both() -> None:
            torch.autograd.grad(view(feature_map), feature_map, weight)

        return both

    ratio = pairs.compare(run(without_dc), run(by_dct), pairs=count, calls=CALLS)
    return pairs.row(f"view of {shape}: mean subtracted / DCT", ratio, VIEW_BAR)


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown: times, then memory."""
    lines = ["| a step's memory beside the models | MB |", "|---|---|"]
    lines += [f"| {name} | {size / 1e6:.1f} |" for name, size in found["memory"].items()]
    return "\n".join([pairs.table(found), "", *lines])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for scalekd.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny models and images, six pairs")
    args = parser.parse_args()
    names, size, batch, count = (
        ("swin_tiny_patch4_window7_224", "resnet18"),
        args.image_size,
        args.batch_size,
        args.pairs,
    )
    if args.dry_run:
        names, size, batch, count = ("test_vit", "test_vit2"), 32, 4, 6
    torch.manual_seed(0)
    rows, memory = steps(names, size, batch, count, args.device)
    rows.append(views((batch, 8, 7, 7) if args.dry_run else (batch, 768, 7, 7), count, args.device))
    about = f"{names[0]} -> {names[1]}, {size} px, batch {batch}, timm {timm.__version__}"
    found = {**pairs.results(rows, about, args.device), "memory": memory}
    print(table(found))
    pairs.keep(found, args.out, "scalekd")


if __name__ == "__main__":
    main()
