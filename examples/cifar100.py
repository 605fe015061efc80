"""CIFAR-100 at equal passes: CE, KD, DiSK, CIFD and ScaleKD students of one teacher, from data to table.

Trains the teacher and the CE warm starts, searches the settings of KD and of DiSK with the same number of trials on
5,000 held-out training images (``--search``; frozen in results/*_search.json), then trains every row of the report on
all 50,000 images from the same start and batches, with the same learning rate and number of passes. Reported is the
last epoch. Each row and seed has its own folder: the same command resumes from the last complete epoch, and
``--collect`` tabulates whatever has finished. ``--converged`` is the long protocol: 60 epochs of CE, then 60 of each
row of ``trials.CONVERGED``. Passes are not time: ScaleKD's holds the teacher's last stage too; see ``--time``.

Usage: python examples/cifar100.py --data data/cifar100.npz [--student NAME] [--teacher NAME] [--epochs N] [--seeds N]
       [--converged] [--methods NAME ...] [--only SEED ...] [--collect]
       [--search | --search-cifd | --search-scalekd | --screen | --repeat | --regimes | --conditions | --time]
       [--trials N] [--device cuda] [--out DIR] [--dry-run]
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from small_images import data, trials
from small_images.conditions import conditions, conditions_table
from small_images.experiment import Experiment
from small_images.final import Final
from small_images.methods import METHODS
from small_images.networks import SWIN, TEACHERS
from small_images.report import (
    compared_table,
    regimes_table,
    search_table,
    seconds_table,
    table,
    write,
    write_curves,
    write_modules,
)
from small_images.resnet import SHAPES
from small_images.screening import regimes, repeated

RESULTS = Path(__file__).parent / "results"
ENDLESS = 2**31


def arguments() -> argparse.Namespace:
    """Parse the flags; a dry run shrinks everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="cifar100.npz, or the folder that holds cifar-100-python/")
    parser.add_argument("--student", choices=sorted(SHAPES), default="resnet10-xxs")
    parser.add_argument("--teacher", choices=TEACHERS, default="resnet10-l")
    names = sorted({*METHODS, *trials.rows(1.0)})
    parser.add_argument("--methods", nargs="+", choices=names, default=["ce", "kd", "searched", "disk-alternating"])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, help="2 for --conditions, else 3")
    parser.add_argument("--converged", action="store_true", help="the long protocol's epochs and rows")
    parser.add_argument("--collect", action="store_true", help="train nothing: the table of what has finished")
    parser.add_argument("--temperature", type=float, default=1.0, help="of disk and uniform: the best for KD")
    parser.add_argument(
        "--third",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also KD at a third of the passes, the paper's own comparison",
    )
    parser.add_argument("--search", action="store_true", help="search settings on held-out training images")
    parser.add_argument("--search-cifd", action="store_true", help="the same for CIFD, alone and guided")
    parser.add_argument("--search-scalekd", action="store_true", help="the same for ScaleKD; needs --teacher swin")
    parser.add_argument("--screen", action="store_true", help="look at further settings of DiSK on the same images")
    parser.add_argument("--repeat", action="store_true", help="train what came close to the best from two more starts")
    parser.add_argument("--regimes", action="store_true", help="few images, wrong labels, no warm start")
    parser.add_argument("--conditions", action="store_true", help="16 px: where does a scaffold win on a CNN?")
    parser.add_argument("--time", action="store_true", help="time an epoch of each method alone")
    parser.add_argument("--teacher-epochs", type=int, default=24)
    parser.add_argument("--warm-epochs", type=int, default=15, help="of the CE warm start")
    parser.add_argument("--search-epochs", type=int, default=15)
    parser.add_argument("--trials", type=int, default=8, help="of each method in a search; CIFD's are fixed")
    parser.add_argument("--views", type=int, help="distinct augmented copies of each image (30 on a CPU, else endless)")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--side-by-side", type=int, help="trials of the search (8) or rows (1) that train as one")
    parser.add_argument(
        "--only", type=int, nargs="+", help="groups of the search, seeds of the report or conditions, from 0; no table"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar100"))
    parser.add_argument("--dry-run", action="store_true", help="random images, two epochs of everything")
    if parser.parse_known_args()[0].converged:
        parser.set_defaults(warm_epochs=60, epochs=60, methods=trials.CONVERGED, third=False)
    args = parser.parse_args()
    args.seeds = args.seeds or (2 if args.conditions else 3)
    args.held_out = data.HELD_OUT
    args.views = args.views or (30 if args.device == "cpu" else ENDLESS)
    if args.dry_run:
        args.teacher = args.teacher if args.teacher == SWIN else "resnet10-s"
        args.student, args.compile, args.held_out, args.trials = "resnet10-xxs", False, 200, 2
        args.epochs = args.teacher_epochs = args.warm_epochs = args.search_epochs = args.views = args.seeds = 2
        args.epochs = 3
    elif args.data is None:
        parser.error("--data is needed: a cifar100.npz, or the folder that holds cifar-100-python/")
    mapped = [name for name in args.methods if name in METHODS and METHODS[name].reads_maps]
    if (mapped or args.search_scalekd) and args.teacher != SWIN:
        parser.error(f"{' and '.join(mapped) or '--search-scalekd'} needs --teacher {SWIN}, got {args.teacher}")
    return args


def frozen(pair: str, flag: str, args: argparse.Namespace) -> dict[str, Any]:
    """Read the settings that a search froze for this pair.

    Raises:
        FileNotFoundError: no search was run for it.
    """
    path = RESULTS / f"{pair}_{flag_name(flag)}.json"
    if not path.exists():
        command = f"python examples/cifar100.py {flag} --student {args.student} --teacher {args.teacher}"
        raise FileNotFoundError(
            f"expected the settings of a search in {path}, got none: run {command} and copy it there"
        )
    return json.loads(path.read_text())


def flag_name(flag: str) -> str:
    """Return what a search's file is called: "search", or "scalekd_search" of --search-scalekd."""
    return "_".join(reversed(flag.removeprefix("--").split("-")))


def needed(family: str, args: argparse.Namespace) -> bool:
    """Return whether a row needs the settings of a family's search."""
    return any((METHODS[name].searched_as or "").endswith(family) for name in args.methods if name in METHODS)


def write_search(found: dict[str, Any], stem: Path) -> None:
    """Write a search, of CIFD with its modules."""
    shown = f"{search_table(found)}\n\n{found['modules_table']}" if "modules" in found else search_table(found)
    write(found, shown, stem.with_suffix(".json"))
    if "modules" in found:
        write_modules(found["modules"], stem.with_name(f"{stem.name.removesuffix('_search')}_modules.png"))


def settings(experiment: Experiment, pair: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Return what the searches chose, from their files; None after a search that was asked for.

    A dry run searches what its rows need.
    """
    searches = {
        "--search": (args.search, True, experiment.search),
        "--search-cifd": (args.search_cifd, needed("cifd", args), experiment.search_cifd),
        "--search-scalekd": (args.search_scalekd, needed("scalekd", args), experiment.search_scalekd),
    }
    asked = [flag for flag, (is_asked, *_) in searches.items() if is_asked]
    search: dict[str, Any] | None = None
    for flag, (_, is_needed, run) in searches.items():
        if flag in asked or (args.dry_run and is_needed and not asked):
            found = run(args.only if asked else None)
            if found is not None:
                write_search(found, args.out / f"{pair}_{flag_name(flag)}")
        elif is_needed and not asked:
            found = frozen(pair, flag, args)
        else:
            continue
        if search is None:
            search = found
        else:
            search["chosen"] |= found["chosen"]
    return None if asked else search


def main() -> None:
    """Search, screen, repeat, compare regimes, time, or report."""
    args = arguments()
    experiment = Experiment(args)
    pair = f"cifar100_{args.teacher.removeprefix('resnet')}_{args.student.removeprefix('resnet')}"
    args.out.mkdir(parents=True, exist_ok=True)
    search = settings(experiment, pair, args)
    if search is None:
        return
    if args.screen:
        name, found, shown = "screen", experiment.tried(trials.SCREEN, "screen", args.only), search_table
    elif args.repeat:
        screen = json.loads((RESULTS / f"{pair}_screen.json").read_text())
        name, found, shown = "repeat", repeated(experiment, search["rows"] | screen["rows"], args.only), compared_table
    elif args.regimes:
        name, found, shown = "regimes", regimes(experiment, search, args.only), regimes_table
    elif args.time:
        name, found, shown = "seconds", experiment.seconds(search), seconds_table
    elif args.conditions:
        name, shown = "conditions", conditions_table
        path = args.out / f"{pair}_conditions.json"
        only, earlier = [] if args.collect else args.only, json.loads(path.read_text()) if path.exists() else None
        found = conditions(
            experiment, only, lambda so_far: path.write_text(json.dumps(so_far, indent=1) + "\n"), earlier
        )
    else:
        final = Final(experiment, search)
        if not args.collect:
            final.train(list(range(args.seeds)) if args.only is None else args.only)
        name, shown = "converged" if args.converged else f"{args.epochs}", table
        found = final.collect() if args.only is None else None
    if found is None or (args.only is not None and args.screen):
        return  # a part of the work; the call without --only collects
    write(found, shown(found), args.out / f"{pair}_{name}.json")
    if shown is table:
        write_curves(found, args.out, f"{pair}_{name}")


if __name__ == "__main__":
    main()
