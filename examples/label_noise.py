"""Is the guide a label-error detector? A tenth of CIFAR-100's training labels are flipped.

Teacher and student train on the flipped labels; DiSK's g and discount and both networks' cross-entropy are recorded for
every sample and epoch with ``disk_plugin.diagnostics``, and each is scored as a label-error detector by the area under
its ROC curve. No setting is chosen here: DiSK runs with the default schedule, and with the settings that ``cifar100.py
--search`` froze, without flipped labels; CE and KD are the baselines.

Usage: python examples/label_noise.py --data data/cifar100.npz [--samples N] [--epochs N] [--out DIR] [--dry-run]
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from small_images import data
from small_images.methods import CE, KD, Batch, DiSK, Method
from small_images.report import machine
from small_images.resnet import SHAPES, ResNet
from small_images.training import Recipe, Run
from small_images.views import Views
from torch.nn import functional as F  # noqa: N812

from disk_plugin.diagnostics import (
    SampleRecord,
    detection_auroc,
    gallery,
    plot_against_ce,
    plot_over_epochs,
    plot_per_class,
)

RESULTS = Path(__file__).parent / "results"
TEACHER, STUDENT, SHARE = "resnet10-s", "resnet10-xxs", 0.1


class RecordedDiSK(DiSK):
    """DiSK with a per-sample record of each epoch."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.record = SampleRecord()

    def terms(self, student_logits, batch: Batch):
        """Record the batch, with the teacher's cross-entropy and the student's without DiSK's weight."""
        terms = super().terms(student_logits, batch)
        teacher_ce = F.cross_entropy(batch.teacher_logits, batch.labels, reduction="none")
        self.record.add(batch.index, self.epoch, terms, target=batch.labels, teacher_ce=teacher_ce)
        return terms


def table(results: dict[str, Any]) -> str:
    """Return the areas as Markdown."""
    names = {
        "guide": "g",
        "1 - guide": "1 - g",
        "discount": "discount",
        "ce": "student's CE",
        "teacher_ce": "teacher's CE",
        "1 - correct": "share of epochs the student was wrong",
    }
    lines = ["| ranks the flipped labels on top | mean over epochs | last epoch |", "|---|---|---|"]
    for settings, scores in results["auroc"].items():
        for key, name in names.items():
            lines.append(f"| {name} ({settings}) | {scores['mean'][key]:.3f} | {scores['last'][key]:.3f} |")
    accuracy = ", ".join(f"{name} {value:.1f}" for name, value in results["accuracy"].items())
    return "\n".join([*lines, "", f"Test accuracy of the last epoch: {accuracy}."])


def arguments() -> argparse.Namespace:
    """Parse the flags; a dry run shrinks everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="cifar100.npz, or the folder that holds cifar-100-python/")
    parser.add_argument("--samples", type=int, default=50000, help="training images to use")
    parser.add_argument("--epochs", type=int, default=10, help="of the teacher, and of the student")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None)
    parser.add_argument("--out", type=Path, default=Path("runs/label_noise"))
    parser.add_argument("--dry-run", action="store_true", help="random images, two epochs")
    args = parser.parse_args()
    if args.data is None and not args.dry_run:
        parser.error("--data is needed: a cifar100.npz, or the folder that holds cifar-100-python/")
    if args.dry_run:
        args.epochs, args.compile = 2, False
    return args


def load(args: argparse.Namespace) -> tuple[data.Split, data.Split, torch.Tensor, data.Split]:
    """Return the images used, the same with flipped labels, which ones are flipped, and the test split."""
    whole, held_out = data.synthetic() if args.dry_run else data.load(args.data)
    chosen = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(1))[: args.samples]
    clean = whole.part(chosen)
    labels, flipped = data.flip(clean.labels, SHARE)
    train = data.Split(*(part.to(args.device) for part in (clean.images, labels)))
    return clean, train, flipped, data.Split(*(part.to(args.device) for part in held_out))


def fit(args: argparse.Namespace, train: data.Split, held_out: data.Split) -> tuple[Run, Run, dict[str, Any]]:
    """Train the teacher, then all students in parallel; return both runs and DiSK's settings."""
    every = torch.arange(len(train.labels))

    def run_of(model: str, methods: dict[str, Method], teacher: ResNet | None) -> Run:
        recipe = Recipe(model, args.epochs, 0, device=args.device, compiled=args.compile)
        return Run(recipe, methods, None, Views(train, args.epochs, teacher, None), every, held_out, None).fit()

    teacher_run = run_of(TEACHER, {"ce": CE()}, None)
    teacher = ResNet(TEACHER).to(args.device).eval().requires_grad_(False)
    teacher.load_state_dict(teacher_run.states()["ce"])
    search = json.loads((RESULTS / "cifar100_10-l_10-xxs_search.json").read_text())
    settings = {"default schedule": {}, "searched": search["chosen"]["disk"]["settings"]}
    run = {"feature_dim": SHAPES[TEACHER][0][-1], "epochs": args.epochs, "seed": 0}
    # the same budget for both: the search's, if the settings have none
    methods = {name: RecordedDiSK.made(own, budget=search["budget"], **run) for name, own in settings.items()}
    others = {"ce": CE(), "kd": KD(**search["chosen"]["kd"]["settings"])}
    return teacher_run, run_of(STUDENT, {**methods, **others}, teacher), settings


def draw(samples: Any, images: torch.Tensor, last: int, out: Path) -> None:
    """Write the figures of one record."""
    drawn = {
        "over_epochs": plot_over_epochs(samples),
        "against_ce": plot_against_ce(samples, epoch=last),
        "per_class": plot_per_class(samples, epoch=last),
        "gallery": gallery(samples, images, epoch=last),
    }
    for name, figure in drawn.items():
        figure.savefig(out / f"label_noise_{name}.png", dpi=70)


def main() -> None:
    """Train on flipped labels, score and draw."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    clean, train, flipped, held_out = load(args)
    teacher_run, student_run, settings = fit(args, train, held_out)
    last, auroc = args.epochs - 1, {}
    for name in settings:
        record = student_run.methods[name].record
        samples = record.table()
        auroc[name] = {
            "mean": detection_auroc(samples, flipped),
            "last": detection_auroc(samples, flipped, epoch=last),
        }
        record.write(args.out / f"label_noise_{name.replace(' ', '_')}.parquet")
    draw(samples, clean.images, last, args.out)  # of the searched settings, the last
    results = {
        "protocol": {
            "samples": len(flipped),
            "epochs": args.epochs,
            "share": SHARE,
            "machine": machine(args.device),
        },
        "accuracy": {"teacher": teacher_run.logs["ce"][-1]["accuracy"]}
        | {name: log[-1]["accuracy"] for name, log in student_run.logs.items()},
        "settings": settings,
        "auroc": auroc,
    }
    (args.out / "label_noise.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
