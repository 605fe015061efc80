"""Where does DiSK help? A map over student width, number of images and classes, with real problems as points.

A synthetic family (Gaussian clusters in 16 dimensions, as in scaffold_target.py), scikit-learn's digits with and
without shifts, and, with ``--data``, CIFAR-100's pixels. In every cell the students start from the same CE-trained one
and make the same number of passes; each method's setting is chosen on validation data (KD: six, each form of DiSK:
three temperatures) and reported on fresh test data. Writes regime_map.json after every problem, then the figure, the
table and the rule of ``disk_plugin.diagnostics.capacity_gap``. The same command resumes an interrupted run.

Usage: python examples/regime_map.py [--data data/cifar100.npz] [--coarse] [--seeds N] [--report] [--out DIR]
       [--dry-run]
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from regime import problems, report
from regime.arms import ARMS, KD_SETTINGS
from regime.cells import cells
from tqdm import tqdm

STRUCTURES = ((10, 3), (10, 30), (30, 10), (100, 3))  # classes, clusters per class
WIDTHS, IMAGES = (4, 8, 12, 24, 48), (300, 1000, 3000)
COARSE_WIDTHS, COARSE_IMAGES = (4, 12, 48), (300, 3000)
REAL_SEEDS = 6  # their splits are fixed and small


class Row(NamedTuple):
    """A problem's constructor, and the student widths to try on it."""

    make: Callable[[], problems.Problem]
    widths: tuple[int, ...]


def rows(args: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Yield the rows to run, with the key of each stored problem."""
    widths, images = (COARSE_WIDTHS, COARSE_IMAGES) if args.coarse else (WIDTHS, IMAGES)
    seeds, real = range(args.seeds), range(1 if args.dry_run else max(args.seeds, REAL_SEEDS))
    for classes, clusters in STRUCTURES[:2] if args.dry_run else STRUCTURES:
        for count in images[:1] if args.dry_run else images:
            make = partial(problems.synthetic, classes, clusters, count, seeds, dry_run=args.dry_run)
            yield f"{classes} x {clusters}, {count}", Row(make, widths)
    for name, shifted in {"digits": False, "digits, shifted": True}.items():
        yield name, Row(partial(problems.digit_images, real, shifted=shifted, dry_run=args.dry_run), (4, 6, 10))
    if args.data or args.dry_run:
        yield "CIFAR-100 pixels", Row(partial(problems.cifar_pixels, args.data, real, dry_run=args.dry_run), (8, 16))


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """Return what must not change when a run is resumed."""
    arms = {name: arm.loss for name, arm in ARMS.items()}
    return {"seeds": args.seeds, "kd": KD_SETTINGS, "arms": arms, "dry_run": args.dry_run}


def run(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Train what the file lacks; write it after every problem."""
    results: dict[str, Any] = {"protocol": protocol(args), "problems": {}}
    if path.exists():
        results = json.loads(path.read_text())
        if results["protocol"] != protocol(args):
            raise SystemExit(f"{path} comes from another protocol, {results['protocol']}: move it away to start anew")
    for key, row in tqdm(list(rows(args)), desc="problems"):
        stored = results["problems"].get(key, {"cells": []})
        if {cell["width"] for cell in stored["cells"]} >= set(row.widths):
            continue
        start = time.process_time()
        found = cells(row.make(), row.widths)
        results["problems"][key] = {"cpu_seconds": round(time.process_time() - start, 1), "cells": found}
        path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    """Parse the flags, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="cifar100.npz, or the folder that holds cifar-100-python/")
    parser.add_argument("--coarse", action="store_true", help="three widths, two numbers of images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="train nothing: figures and rule of what is stored")
    parser.add_argument("--out", type=Path, default=Path("runs/regime_map"))
    parser.add_argument("--dry-run", action="store_true", help="few problems, two passes, one seed")
    args = parser.parse_args()
    if args.dry_run:
        args.coarse, args.seeds = True, 1
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "regime_map.json"
    results = json.loads(path.read_text()) if args.report else run(args, path)
    report.write(results, args.out)


if __name__ == "__main__":
    main()
