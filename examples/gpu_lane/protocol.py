"""The 200-epoch protocol: ResNet10-l to -xxs and to -s, every method of a seed side by side, as many seeds as fit.

Teacher, then per student and seed a CE warm start and all methods from it, on the same batches: SGD .1, momentum .9,
weight decay 5e-4, cosine, batch 200, the paper's augmentation, bfloat16 networks and float32 losses. Nothing is
searched here, so all training images are trained on; the last epoch counts. Every finished student is a line of
``results.jsonl``; the same command with the same ``--out`` goes on where time ran out.

Usage: python -m gpu_lane.protocol --out DIR [--data FILE] [--seconds N] [--epochs N] [--seeds N] [--methods NAME ...]
       [--teacher-checkpoint FILE] [--eager] [--device D] [--dry-run]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from small_images import data
from small_images.resnet import ResNet, State
from small_images.views import accuracies, error

from . import packed
from .graphs import BRANCHES, GRAPH
from .methods import CE, METHODS, made
from .report import summary, table
from .runs import Plan, Run
from .store import Guard, Results, Store
from .views import DeviceViews, fitting

STUDENTS = ("resnet10-xxs", "resnet10-s")  # the second one when every seed of the first is done
_JUDGED = 10_000  # training images by which the warm start's error is measured, as they are


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; a dry run shrinks everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="cifar100.npz, cifar-100-python/'s folder, or a packed file; else random"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=480.0, help="after which it stops cleanly")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--warm-epochs", type=int, default=30)
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--teacher-checkpoint", type=Path, help="state of a ResNet10-l, instead of training one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--views", type=int, default=40, help="distinct augmented copies of each image, if they fit")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true", help="600 random images, two epochs of everything, one seed")
    args = parser.parse_args(given)
    args.teacher, args.students = "resnet10-l", STUDENTS
    if args.dry_run:
        args.teacher, args.students, args.seeds, args.data, args.batch_size = "resnet10-s", STUDENTS[:1], 1, None, 50
        args.epochs = args.warm_epochs = args.teacher_epochs = args.views = 2
    return args


def load(args: argparse.Namespace) -> tuple[data.Split, data.Split, str]:
    """Return training and test split on the device, and what they are."""
    if args.data is None:
        kind = "random images in 100 classes that differ in their mean colour"
        splits = data.synthetic(600 if args.dry_run else 60_000)
    elif packed.is_packed(args.data):
        splits, kind = packed.read(args.data)
    else:
        splits, kind = data.load(args.data), "CIFAR-100"
    train, test = (data.Split(*(part.to(args.device) for part in split)) for split in splits)
    return train, test, kind


class Protocol:
    """Teacher, warm starts and students of one call."""

    def __init__(self, args: argparse.Namespace, guard: Guard) -> None:
        self.args, self.guard, self.out = args, guard, args.out
        train, self.test, kind = load(args)
        self.views = DeviceViews(train, fitting(args.views, train.images, args.device))
        self.store = Store(self.out / "state.pt")
        self.ways = () if args.eager else (BRANCHES, GRAPH)
        keys = ("teacher", "epochs", "warm_epochs", "teacher_epochs", "batch_size")
        self.protocol = {key: getattr(args, key) for key in keys}
        if args.teacher_checkpoint:
            self.protocol["teacher_epochs"] = f"given: {args.teacher_checkpoint.name}"
        self.protocol |= {
            "data": kind,
            "images": len(train.labels),
            "views": self.views.count,
            "content": self.views.content,
        }
        self.results = Results(self.out / "results.jsonl", self.protocol)
        self.unfinished: dict[str, Any] = {}

    def machine(self) -> dict[str, str]:
        """Say what it ran on."""
        name = torch.cuda.get_device_name() if self.args.device == "cuda" else "CPU"
        return {"device": name, "torch": torch.__version__}

    def run(self) -> bool:
        """Do what is left, the most important first; return whether all is done."""
        for student in self.args.students:
            for seed in range(self.args.seeds):
                methods = self.results.missing(student, seed, self.args.methods)
                if methods and not self._students(student, seed, methods):
                    return False
        return True

    def _students(self, student: str, seed: int, methods: list[str]) -> bool:
        if self.views.teacher is None and not self._teacher():
            return False
        warm = self._trained(f"warm start {student}", Plan(student, self.args.warm_epochs, seed, self.args.batch_size))
        if warm is None:
            return False
        start, accuracy = warm
        plan = Plan(student, self.args.epochs, seed, self.args.batch_size)
        about = {"feature_dim": self.views.teacher.classifier.in_features, "epochs": plan.epochs, "seed": seed}
        train = self.views.train
        about |= {"budget": error(student, start, train.part(slice(_JUDGED))), "samples": len(train.labels)}
        own = {name: made(name, **about) for name in methods}
        run = Run("students", plan, own, start, self.views, self.test, self.store, self.ways)
        done = run.fit(self.guard)
        self._report(run, student, seed, accuracy, done)
        return done

    def _report(self, run: Run, student: str, seed: int, warm: float, done: bool) -> None:
        """Write a line for each student that is done, or what there is of those that are not."""
        common = {"student": student, "seed": seed, "epochs": run.epoch, "warm_start": warm, "seconds": run.seconds}
        common |= {"teacher": self.teacher_accuracy, "side_by_side": len(run.logs), "step": run.how, "dense": run.dense}
        for name, log in run.logs.items():
            scores = [(each["epoch"], each["accuracy"]) for each in log if "accuracy" in each]
            row = {**common, "method": name, "accuracies": scores, "last": log[-1] if log else {}, **self.machine()}
            row["settings"] = METHODS[name][1]
            if done:
                self.results.add({**row, "accuracy": scores[-1][1]})
            else:
                self.unfinished[name] = row

    def _teacher(self) -> bool:
        """Train the teacher, or take the one that was given."""
        args = self.args
        model = ResNet(args.teacher).to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        if args.teacher_checkpoint:
            model.load_state_dict(torch.load(args.teacher_checkpoint, args.device, weights_only=True))
        else:
            found = self._trained("teacher", Plan(args.teacher, args.teacher_epochs, 0, args.batch_size))
            if found is None:
                return False
            model.load_state_dict(found[0])
        self.teacher_accuracy = accuracies(model, self.test, 1)[0]
        self.views.teacher = model
        return True

    def _trained(self, name: str, plan: Plan) -> tuple[State, float] | None:
        """Train a network with cross-entropy alone; return its state and accuracy, or None if time ran out."""
        settings = {**plan._asdict(), **self.protocol, "what": name}
        kept = self.store.get(name, settings)
        if kept is None:
            torch.manual_seed(plan.seed)
            start = ResNet(plan.model).state_dict()
            run = Run(
                "cross-entropy", plan, {"ce": CE()}, start, self.views.untaught(), self.test, self.store, self.ways
            )
            if not run.fit(self.guard):
                return None
            state = {key: value.cpu() for key, value in run.students.states()["ce"].items()}
            kept = {"state": state, "accuracy": run.logs["ce"][-1]["accuracy"]}
            self.store.put(name, settings, kept)
        return kept["state"], kept["accuracy"]


def main() -> None:
    """Train until all is done or the time is over; print and write what there is."""
    args = arguments()
    guard = Guard(args.seconds).listen()
    torch.backends.cudnn.benchmark = True
    protocol = Protocol(args, guard)
    args.out.mkdir(parents=True, exist_ok=True)
    done = protocol.run()
    found = summary(protocol.results.rows, protocol.unfinished, protocol.protocol, done=done, **protocol.machine())
    (args.out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    print(f"{'all is done' if done else 'stopped in time, the same command goes on'} after {guard.passed:.0f} s")


if __name__ == "__main__":
    main()
