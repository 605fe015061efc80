"""DiSK's loss, the guide's logit given, against KD's: time of forward and backward, eager and compiled, and memory.

KD is tau^2 KL(t || s) from softmax and kl_div, alone ("KL") and with the cross-entropy that DiSK's loss contains
("CE + KL", as in mdistiller). Gradients are w.r.t. the student's logits and, for DiSK, the guide's.

Memory is peak resident memory (Linux, VmHWM) beyond that with the inputs alone, in a separate process per loss; on CUDA
the allocator's peak. It includes the gradient.

Usage: python benchmarks/loss.py [--pairs N] [--device D] [--out DIR] [--dry-run]
"""

import argparse
import itertools
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pairs
import torch
from distillation import kd_loss, kl_loss
from torch import Tensor

from disk_plugin.functional import disk_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# (N, C) -> calls per timing
SHAPES = {"eager": {(64, 100): 50, (1024, 1000): 3}, "compiled": {(1024, 1000): 3, (4096, 32000): 1}}
LARGEST = (4096, 32000)
BARS = {"eager": {(1024, 1000): 1.7}, "compiled": {(1024, 1000): 1.15, (4096, 32000): 1.15}}
MEMORY_BAR = 1.0
OURS: dict[str, Loss] = {"DiSK": disk_loss, "DiSK, top_k=20": partial(disk_loss, top_k=20)}
THEIRS: dict[str, Loss] = {
    "KL": lambda student, teacher, target, guide: kl_loss(student, teacher),
    "CE + KL": lambda student, teacher, target, guide: kd_loss(student, teacher, target),
}


def inputs(shape: tuple[int, int], device: str) -> tuple[Tensor, ...]:
    """Make the student's logits, the teacher's, the target and the guide's logits."""
    torch.manual_seed(0)
    count, classes = shape
    student, teacher = (torch.randn(shape, device=device).mul_(3) for _ in range(2))
    target, guide = torch.randint(classes, (count,), device=device), torch.randn(count, device=device)
    return student.requires_grad_(), teacher, target, guide.requires_grad_()


def gradients(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor, guide: Tensor) -> tuple[Tensor, ...]:
    """Evaluate the loss, forward and backward."""
    value = loss(student, teacher, target, guide)
    return torch.autograd.grad(value, [student, guide], allow_unused=True)


def timed(shapes: dict[tuple[int, int], int], count: int, device: str, backend: str | None) -> list[dict[str, Any]]:
    """Compare our losses with theirs at every shape; with a backend, compiled and for the default settings only."""
    kind, rows = "compiled" if backend else "eager", []
    ours = dict(list(OURS.items())[:1]) if backend else OURS
    for shape, calls in shapes.items():
        torch.compiler.reset()  # the graphs of the last shape
        given = inputs(shape, device)
        steps = {name: partial(gradients, _compiled(loss, backend), *given) for name, loss in (ours | THEIRS).items()}
        for name, other in itertools.product(ours, THEIRS):
            ratio = pairs.compare(steps[name], steps[other], pairs=count, calls=calls)
            bar = BARS[kind].get(shape) if (name, other) == ("DiSK", "KL") else None
            rows.append(pairs.row(f"{kind} {shape}: {name} / {other}", ratio, bar))
    return rows


def _compiled(loss: Loss, backend: str | None) -> Loss:
    return torch.compile(loss, fullgraph=True, backend=backend, dynamic=False) if backend else loss


def peaks(shape: tuple[int, int], device: str) -> dict[str, int]:
    """Peak bytes of each loss, in a fresh process each."""
    found = {}
    for name in [*OURS, *THEIRS]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            found[name] = child.submit(peak_bytes, name, shape, device).result()
    return found


def peak_bytes(name: str, shape: tuple[int, int], device: str) -> int:
    """Return the peak bytes of forward and backward beyond the inputs."""
    loss = (OURS | THEIRS)[name]
    gradients(loss, *inputs((8, 100), device))
    given = inputs(shape, device)
    before = _high_water(device)
    gradients(loss, *given)
    return _high_water(device) - before


def _high_water(device: str) -> int:
    """Return the peak bytes so far: of this process on a CPU (not ru_maxrss, which depends on its parent's size)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown: times, then memory."""
    memory = found["memory"]
    lines = ["| peak memory, eager | ratio | bar | ours / theirs |", "|---|---|---|---|"]
    for name, other in itertools.product(OURS, THEIRS):
        ours, theirs = memory["bytes"][name], memory["bytes"][other]
        bar = f"{MEMORY_BAR:.2f}" if (name, other) == ("DiSK", "KL") else ""
        what = f"({', '.join(map(str, memory['shape']))}): {name} / {other}"
        lines.append(f"| {what} | {ours / theirs:.3f} | {bar} | {ours / 1e6:.0f} MB / {theirs / 1e6:.0f} MB |")
    return "\n".join([pairs.table(found), "", *lines])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for loss.json")
    parser.add_argument("--dry-run", action="store_true", help="small logits, six pairs, traced but not compiled")
    args = parser.parse_args()
    shapes, largest, count, backend = SHAPES, LARGEST, args.pairs, "inductor"
    if args.dry_run:
        shapes, largest, count, backend = {kind: {(8, 10): 1} for kind in SHAPES}, (512, 2000), 6, "eager"
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        print("compiled rows are skipped: no C++ compiler (g++, or what CXX names)")
        backend = None
    rows = timed(shapes["eager"], count, args.device, None)
    rows += timed(shapes["compiled"], count, args.device, backend) if backend else []
    found = pairs.results(rows, "Forward and backward of the loss alone", args.device)
    found["memory"] = {"shape": largest, "bytes": peaks(largest, args.device)}
    print(table(found))
    pairs.keep(found, args.out, "loss")


if __name__ == "__main__":
    main()
