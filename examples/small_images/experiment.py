"""The stages of the CIFAR-100 example: teacher, warm starts, search, each stored in its folder."""

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

from disk_plugin.features import Pair, pair_of
from disk_plugin.features.cifd import Embeddings, RateDistortionModule, fit_rdms
from disk_plugin.taps import with_maps

from . import data, trials
from .methods import CE, KD, METHODS, Method, make_method
from .networks import SWIN, network, width_of
from .report import machine
from .resnet import ResNet, State
from .training import MAPS, Recipe, Run
from .views import Views, digest, normalized, outputs_of

SEARCH_SEED = 100  # not one of the report's
TEACHER_SEED = 0
SWINS_TEACHER = "resnet10-l"
TOGETHER = 8  # trials of the search trained as one network


class Experiment:
    """Data, teacher, warm starts and runs of one call, each stored in its folder under ``out``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        train, self.test = data.synthetic() if args.dry_run else data.load(args.data)
        self.test = data.Split(*(part.to(args.device) for part in self.test))
        self.train = data.Split(*(part.to(args.device) for part in train))
        self.all = torch.arange(len(self.train.labels))
        self.searched, held_out = data.search_split(len(self.train.labels), args.held_out)
        self.held_out = self.train.part(held_out)
        self.teacher, self.teacher_accuracy = self.teacher_of(args.teacher)
        self.views = self.views_of(self.train)

    def views_of(self, train: data.Split, teacher: nn.Module | None = None) -> Views:
        """Return augmented views of some images with a teacher's outputs, by default the call's teacher.

        Methods that read maps are built for a Swin teacher alone.
        """
        teacher = teacher or self.teacher
        views = Views(train, self.args.views, teacher, None, maps=not isinstance(teacher, ResNet))
        if self.args.device != "cuda":  # where the teacher's forward is cheaper than reading a file
            views.folder = self.out / f"outputs-{digest(teacher.state_dict())}-{views.content}"
        return views

    def recipe(self, model: str, epochs: int, seed: int) -> Recipe:
        """Return the recipe shared by all runs."""
        args = self.args
        return Recipe(
            model, epochs, seed, lr=args.lr, batch_size=args.batch_size, device=args.device, compiled=args.compile
        )

    def teacher_of(self, name: str) -> tuple[nn.Module, dict[str, float]]:
        """Train a teacher on the search's training images, so that it has not seen the held-out ones either.

        Raises:
            RuntimeError: under ``--collect``, if it is not trained yet.
        """
        args = self.args
        recipe = self.recipe(name, args.teacher_epochs, TEACHER_SEED)._replace(compiled=args.device == "cuda")
        views = Views(self.train, args.views, None, None)
        methods: dict[str, Method] = {"ce": CE()}
        if name == SWIN:  # distilled from a convolutional network, as DeiT; its settings were not searched
            recipe = recipe._replace(optimizer="adamw", lr=1e-3)
            views = self.views_of(self.train, self.teacher_of(SWINS_TEACHER)[0])
            methods = {"kd": KD(temperature=2.0)}
        folder = self.out / f"teacher-{name}-{args.teacher_epochs}"
        run = Run(recipe, methods, None, views, self.searched, self.held_out, folder)
        if args.collect and run.epoch < recipe.epochs:
            raise RuntimeError(f"--collect expects a trained teacher in {folder}, got {run.epoch} of its epochs")
        run.fit()
        model = network(name).to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        [state] = run.states().values()
        model.load_state_dict(state)
        return model, {"held_out": run.accuracies(self.held_out)[0], "test": run.accuracies(self.test)[0]}

    def warm_run(self, seed: int, index: Tensor, judge: data.Split) -> Run:
        """Return the run of a seed's CE student, finished or not."""
        args = self.args
        folder = self.out / f"warm-{args.student}-{args.warm_epochs}-{len(index)}-seed{seed}"
        views = Views(self.train, args.views, None, None)
        recipe = self.recipe(args.student, args.warm_epochs, seed)
        return Run(recipe, {"ce": CE()}, None, views, index, judge, folder)

    def warm_start(self, seed: int, index: Tensor, judge: data.Split) -> tuple[State, float]:
        """Train a student with cross-entropy: the common start of all methods, and its accuracy."""
        run = self.warm_run(seed, index, judge).fit()
        return run.states()["ce"], run.logs["ce"][-1]["accuracy"]

    def methods(self, chosen: dict[str, tuple[str, dict[str, Any]]], epochs: int, seed: int, budget: float):
        """Build methods from name -> (method, settings)."""
        run = {"feature_dim": width_of(self.args.teacher), "epochs": epochs, "seed": seed}
        given = {"rdms": self.rdms, "student_dim": lambda: width_of(self.args.student), "pair": self.pair}
        made: dict[str, Method] = {}
        for name, (method, settings) in chosen.items():
            own = run | {needed: given[needed]() for needed in METHODS[method].needs}
            made[name] = make_method(method, settings, budget=budget, **own)
        return made

    def pair(self) -> Pair:
        """Return student and teacher with their maps, for a method that is built for a pair."""
        images = normalized(self.train.images[:2])
        student = network(self.args.student).to(self.args.device)
        paths = dict(zip(MAPS, (f"blocks.{number}" for number in student.map_blocks), strict=True))
        return pair_of(with_maps(student, paths), with_maps(self.teacher.body), images)

    def rdms(self) -> RateDistortionModule:
        """Fit rate-distortion modules to the teacher's embeddings of one view of the search's images."""
        path = self.out / f"rdms-{self.args.teacher}.pt"
        if not path.exists():
            seen, (logits, features, *_) = self.searched, self.views(SEARCH_SEED, 0)[1]
            labels = self.train.labels[seen]
            embeddings = Embeddings(features[seen].float(), logits[seen].float(), labels)
            short = {"epochs": 1} if self.args.dry_run else {}
            fit_rdms(embeddings, device=self.args.device, **short).save(path)
        return RateDistortionModule.load(path).to(self.args.device)

    def tried(
        self,
        chosen: dict[str, tuple[str, dict[str, Any]]],
        name: str,
        only: list[int] | None = None,
        seed: int = SEARCH_SEED,
    ) -> dict[str, Any]:
        """Train every trial from one warm start, several jointly; return each one's log, by name.

        ``only`` selects groups, so that several processes can share the work; the call without it collects.
        """
        args = self.args
        start, accuracy = self.warm_start(seed, self.searched, self.held_out)
        names, rows = list(chosen), {}
        together = args.side_by_side or TOGETHER
        groups = [names[i : i + together] for i in range(0, len(names), together)]
        for number, group in enumerate(groups):
            if only is None or number in only:
                own = {each: chosen[each] for each in group}
                methods = self.methods(own, args.search_epochs, seed, 1 - accuracy / 100)
                recipe = self.recipe(args.student, args.search_epochs, seed)
                folder = self.out / f"{name}-{args.student}-{number}"
                logs = Run(recipe, methods, start, self.views, self.searched, self.held_out, folder).fit().logs
                for each in group:
                    method, settings = chosen[each]
                    last = logs[each][-1]["accuracy"]
                    rows[each] = {"method": method, "settings": settings, "accuracy": last, "log": logs[each]}
        protocol = {"epochs": args.search_epochs, "seed": seed, "held_out": len(self.held_out.labels)}
        return {
            "protocol": {**protocol, "student": args.student, "teacher": args.teacher, "machine": machine(args.device)},
            "teacher": self.teacher_accuracy["held_out"],
            "warm_start": accuracy,
            "rows": rows,
        }

    def search(self, only: list[int] | None) -> dict[str, Any] | None:
        """Search the settings of KD and of DiSK with equally many trials; return the best of each and all of them."""
        chosen = trials.named("kd", trials.KD_TRIALS, self.args.trials)
        chosen |= trials.named("disk", trials.DISK_TRIALS, self.args.trials)
        found = self.tried(chosen, "search", only)
        if only is not None:
            return None
        number = {name: sum(method == name for method, _ in chosen.values()) for name in ("kd", "disk")}
        return {**found, "budget": 1 - found["warm_start"] / 100, "trials": number, "chosen": best_of(found)}

    def search_cifd(self, only: list[int] | None) -> dict[str, Any] | None:
        """Search the settings of CIFD, alone and guided, with as many trials as KD and DiSK had."""
        found = self.tried(trials.CIFD_TRIALS, "search-cifd", only)
        if only is not None:
            return None
        rdms = self.rdms()
        modules = {"distortion_weights": rdms.distortion_weights, **rdms.report}
        return {**found, "chosen": best_of(found), "modules": modules, "modules_table": rdms.table()}

    def search_scalekd(self, only: list[int] | None) -> dict[str, Any] | None:
        """Search the settings of ScaleKD, alone and guided, with as many trials each as KD and DiSK."""
        chosen = trials.named("scalekd", trials.SCALEKD_TRIALS, self.args.trials)
        chosen |= trials.named("disk-scalekd", trials.DISK_SCALEKD_TRIALS, self.args.trials)
        found = self.tried(chosen, "search-scalekd", only)
        return None if only is not None else {**found, "chosen": best_of(found)}

    def chosen(self, search: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return each row's method with its settings: those of ``trials.rows``, or what the search froze."""
        rows = trials.rows(self.args.temperature)
        for name in self.args.methods:
            if name not in rows:
                whose = METHODS[name].searched_as
                rows[name] = (name, search["chosen"][whose]["settings"] if whose else {})
        return {name: rows[name] for name in self.args.methods}

    def seconds(self, search: dict[str, Any]) -> dict[str, Any]:
        """Time an epoch of each method alone, with stored teacher outputs, and the teacher's forward separately."""
        start, _ = self.warm_start(SEARCH_SEED, self.searched, self.held_out)
        taken: dict[str, float] = {}
        for epoch in range(4):
            self.views(SEARCH_SEED, epoch)
        for name, chosen in self.chosen(search).items():
            epochs = 1 + METHODS[chosen[0]].step_every
            recipe = self.recipe(self.args.student, epochs, SEARCH_SEED)
            methods = self.methods({name: chosen}, epochs, SEARCH_SEED, search["budget"])
            run = Run(recipe, methods, start, self.views, self.searched, self.held_out, None)
            ends = [time.perf_counter()]
            for _ in range(epochs):
                run.fit_epoch()
                ends.append(time.perf_counter())
            # the first epoch compiles; an alternating method's remaining ones contain its guide passes once
            taken[name] = (ends[-1] - ends[1]) / (epochs - 1)
        images = self.views(SEARCH_SEED, 0)[0]
        for _ in range(2):  # the first call warms up
            begin = time.perf_counter()
            outputs_of(self.teacher, images)[0].cpu()  # synchronizes with the device
            taken["teacher's forward"] = (time.perf_counter() - begin) * len(self.searched) / len(images)
        return {"seconds_per_epoch": taken, "images": len(self.searched), "machine": machine(self.args.device)}


def best_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return each method's best trial."""
    best: dict[str, Any] = {}
    for row in found["rows"].values():
        if row["accuracy"] > best.get(row["method"], {"accuracy": -1.0})["accuracy"]:
            best[row["method"]] = {"settings": row["settings"], "accuracy": row["accuracy"]}
    return best
