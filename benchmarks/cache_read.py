"""Size of a teacher cache and speed of reading it: bytes per sample-view, samples/s on one core in random order.

256 features, 100 classes, the two exact modes with features: "features", whose logits are recomputed by the teacher's
last layer while reading, and "logits+features". The teacher is a random layer on random vectors; its outputs are
written like any other's. The bytes are those of all files, meta.json, the checksums and the last layer included. The
first read of a view compares the checksums of its rows and is timed separately.

Usage: python benchmarks/cache_read.py [--samples N] [--views V] [--batch-size N] [--seconds S] [--out DIR] [--dry-run]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pairs import keep, machine
from torch import nn
from torch.utils.data import TensorDataset

from disk_plugin.cache import SeededViews, TeacherCache

FEATURES, CLASSES = 256, 100
BYTES_WANTED, RATE_WANTED = {"features": 530, "logits+features": 730}, 50_000


def samples_per_second(cache: TeacherCache, batch_size: int, seconds: float) -> tuple[float, float]:
    """Read epochs of random batches for that long; return the medians of each view's first epoch and of the rest."""
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < cache.views + 3 or time.perf_counter() < end:
        view = len(rates) % cache.views
        batches = torch.randperm(cache.samples).split(batch_size)
        start = time.perf_counter()
        for index in batches:
            cache(index, view)
        rates.append(cache.samples / (time.perf_counter() - start))
    return statistics.median(rates[: cache.views]), statistics.median(rates[cache.views :])


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{found['samples']} samples, {found['views']} views, batch {found['batch_size']}; {found['machine']}.",
        "",
        "| mode | bytes per sample-view | wanted | samples/s | first time | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for mode, each in found["modes"].items():
        size, rate, first = (each[name] for name in ("bytes_per_sample_view", "samples_per_second", "first_time"))
        rates = f"{rate:,.0f} | {first:,.0f} | >= {RATE_WANTED:,}"
        lines.append(f"| {mode} | {size:.1f} | <= {BYTES_WANTED[mode]} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    """Write, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0, help="of reading, per mode")
    parser.add_argument("--out", type=Path, help="folder for cache_read.json")
    parser.add_argument("--dry-run", action="store_true", help="5,000 samples, a tenth of a second")
    args = parser.parse_args()
    samples, seconds = (5000, 0.1) if args.dry_run else (args.samples, args.seconds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, FEATURES), nn.ReLU(), nn.Linear(FEATURES, CLASSES))
    views = SeededViews(TensorDataset(torch.randn(samples, 16)), args.views)
    modes = {}
    for mode in BYTES_WANTED:
        with tempfile.TemporaryDirectory() as folder:
            cache = TeacherCache.write(folder, teacher, views, mode=mode)
            size = sum(path.stat().st_size for path in Path(folder).iterdir()) / (samples * args.views)
            first, rate = samples_per_second(cache, args.batch_size, seconds)
        modes[mode] = {"bytes_per_sample_view": size, "samples_per_second": rate, "first_time": first}
    settings = {"machine": machine(), "samples": samples, "views": args.views, "batch_size": args.batch_size}
    found = settings | {"modes": modes}
    print(table(found))
    keep(found, args.out, "cache_read")


if __name__ == "__main__":
    main()
