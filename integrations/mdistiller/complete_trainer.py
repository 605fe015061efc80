"""What is added to each of the host's trainers: seeds, warm start, DiSK's loss and log, atomic files."""

import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mdistiller.engine import trainer as host
from torch import Tensor

from disk_plugin._form import target_of
from disk_plugin._watch import ignoring_past_the_end
from disk_plugin.epoch_report import EpochReport
from disk_plugin.features import GuidedTerms, Method, Outputs
from disk_plugin.functional import DiSKTerms
from disk_plugin.training import GuidedTraining, Schedule

from .checkpoints import deployed_state, load_weights, marked_untrained, warm_start_weights
from .distillers import GuidedDistiller, predicting_method, read
from .epoch_files import Saves, collected, commit, finalize
from .method_distiller import ce_loss
from .seeds import apart, restart_workers, seed_everything
from .teacher_watch import TeacherWatch

FOLDER: list[str] = []  # the run's, set by the launcher: some forks log to a folder that they name by the time
STARTED: list[bool] = []  # whether training has begun


class CompleteTrainer(host.BaseTrainer):
    """Mixed into each of the host's trainers, whose loops are unchanged: seeds, warm start, DiSK's loss and log.

    A guided distiller's loss is evaluated here, once, over the outputs gathered from all replicas: one hinge, one
    student temperature and correct statistics on any number of devices.
    """

    def __init__(self, experiment_name: str, distiller: Any, train_loader: Any, val_loader: Any, cfg: Any) -> None:
        module = distiller.module
        if cfg.DISTILLER.WARM_START:
            weights = warm_start_weights(cfg)
            load_weights(module.student, weights, f"DISTILLER.WARM_START {cfg.DISTILLER.WARM_START}", "student")
        super().__init__(experiment_name, distiller, train_loader, val_loader, cfg)
        if FOLDER:
            self.log_path: str = FOLDER[0]
        keep_settings(self.optimizer)
        self.guided = isinstance(module, GuidedDistiller)
        self.core = self.guided_training(module) if self.guided else None
        self._own_report = EpochReport()  # of a distiller without a guide
        self.guide_turn = False
        self._classes, self._judged = 0, False
        if self.guided:
            module.gathers = True
            distiller.register_forward_hook(self._evaluate_losses, with_kwargs=True)
        elif hasattr(module, "teacher"):
            TeacherWatch(distiller, self._add)

    def guided_training(self, module: GuidedDistiller, **core: Any) -> GuidedTraining:
        """Build the host-independent part of guided training."""
        return GuidedTraining(module.guided, schedule=Schedule(module.dual, module.epochs_per_iteration), **core)

    @property
    def report(self) -> EpochReport:
        """Means over the epoch's samples so far."""
        return self._own_report if self.core is None else self.core.report

    def restart_report(self) -> None:
        """Discard what the report has collected."""
        if self.core is not None:
            self.core.restart_report()

    def train(self, resume: bool = False) -> None:
        """Run the host's epochs; before a killed run goes on, bring its files in order."""
        STARTED.append(True)
        if resume:
            finalize(self.log_path)
        else:  # a checkpoint holds what it left
            self._prepare_method()
        super().train(resume=resume)

    def train_epoch(self, epoch: int) -> None:
        """Seed the epoch, run the host's (training, validation, log), and commit its files together."""
        if self.cfg.SOLVER.SEED is not None:
            seed_everything(self.cfg.SOLVER.SEED, epoch)
            restart_workers(self.train_loader)
        self._own_report = EpochReport()
        if self.core is not None:
            self.core.begin_epoch(epoch - 1)
        elif isinstance(getattr(self.distiller.module, "method", None), Method):
            self.distiller.module.method.begin_epoch(epoch - 1)
        self.before_epoch(epoch)
        with collected() as saves:
            super().train_epoch(epoch)
        commit(self._complete(saves, epoch), self.log_path, epoch)

    def _prepare_method(self) -> None:
        """Run a method's stage before training, by one pass of the teacher over the training data."""
        module = self.distiller.module
        method = getattr(module, "method", None)
        if not isinstance(method, Method) or method.prepared:
            return
        module.teacher.eval()

        def batches() -> Iterator[tuple[Outputs, Tensor]]:
            for image, target, *_ in self.train_loader:
                yield module.teacher_outputs(image.float().cuda(non_blocking=True)), target

        with apart(0):
            report = method.prepare(batches(), folder=Path(self.log_path))
        restart_workers(self.train_loader)
        with open(os.path.join(self.log_path, "worklog.txt"), "a") as log:
            log.write(f"{report}\n")

    def before_epoch(self, epoch: int) -> None:
        """Hook before the host's epoch; does nothing here."""

    def train_iter(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host's step; add DiSK's means to its progress line."""
        message = super().train_iter(*args, **kwargs)
        return message + self._epoch_message() if isinstance(message, str) else message

    def log(self, lr: float, epoch: int, log_dict: dict[str, Any]) -> None:
        """Log as the host does, with DiSK's means, multiplier and budget; step the schedule."""
        self.judge_teacher(epoch)
        log_dict.update(self._epoch_values())
        super().log(lr, epoch, log_dict)
        # before the host saves, as "latest" has to hold the next epoch's schedule
        if self.core is not None:
            with ignoring_past_the_end():  # DISK.DUAL.EPOCHS may be shorter than the run
                self.core.schedule.end()

    def _complete(self, saves: Saves, epoch: int) -> Saves:
        """Mark students that cannot predict by themselves, and add to each what predicts; add ``latest`` if it lacks.

        Some forks save the student alone, from which no run goes on.
        """
        if not any(os.path.basename(path) == "latest" for _, path in saves):
            state = {"epoch": epoch, "best_acc": self.best_acc, "optimizer": self.optimizer.state_dict()}
            state["model"] = self.distiller.state_dict()
            saves = [*saves, (state, os.path.join(self.log_path, "latest"))]
        method = predicting_method(self.distiller.module)
        if method is None:
            return saves
        completed: Saves = []
        for content, path in saves:
            folder, name = os.path.split(path)
            if name.startswith("student_"):
                content = marked_untrained(content)
                whole = os.path.join(folder, name.replace("student_", f"{method}_", 1))
                completed.append((deployed_state(self.distiller.module), whole))
            completed.append((content, path))
        return completed

    def _epoch_values(self) -> dict[str, float]:
        """Return what to log beside the host's values; without a guide, only the teacher's accuracy."""
        means = self.report.means()
        if not means:
            return {}
        accuracy = {"teacher_acc": 100 * means.pop("teacher_accuracy")}  # per cent, as the host's
        del means["student_accuracy"]  # the host's train_acc
        if self.guided:
            disk = self.distiller.module.disk
            values = {"logged_loss": means.pop("logged_loss"), "ce": means.pop("ce"), **accuracy, **means}
            values |= {"multiplier": disk.multiplier.item(), "budget": disk.budget.item()}
            values |= target_of(disk)
        else:
            values = accuracy
        # a mean over no sample is not logged; a NaN loss is
        empty = {name for name, value in values.items() if name.endswith(("_right", "_wrong")) and math.isnan(value)}
        return {name: Significant(value) for name, value in values.items() if name not in empty}

    def judge_teacher(self, epoch: int) -> None:
        """Warn, in the first epoch, of a teacher at chance or behind the student."""
        if epoch > 1 or self._judged or not self._classes:
            return
        weak = self.report.weak_teacher(self._classes)
        if weak is not None:
            self._judged = True
            warnings.warn(weak, stacklevel=2)

    def _epoch_message(self) -> str:
        return "".join(f"| {name}:{value}" for name, value in self._epoch_values().items())

    def _evaluate_losses(self, _: Any, __: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Turn the gathered outputs of a training forward into the losses that the host sums."""
        if self.guide_turn or not self.distiller.training:
            return None
        module, (logits, inputs) = self.distiller.module, output
        core, (teacher, losses) = self.core, read(inputs)
        if core is None:
            return None
        module.set_epoch(kwargs["epoch"])
        self._classes = logits.shape[1]
        target = kwargs["target"]
        loss = core.descended(core.terms(logits, target, teacher, losses).mean())
        return logits, {"loss_disk": loss} | ce_loss(logits, target, module.ce_weight, module.disk.ignore_index)

    def _add(self, terms: DiSKTerms | GuidedTerms, classes: int) -> None:
        self.report.add(terms)
        self._classes = classes


class Significant(float):
    """A number shown with four significant digits in the host's log, which has two decimals."""

    def __format__(self, spec: str) -> str:
        return super().__format__("#.4g")


def keep_settings(optimizer: torch.optim.Optimizer) -> None:
    """Keep this run's rates and decays when the optimizer is resumed, instead of the checkpoint's."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    def restore(resumed: torch.optim.Optimizer) -> None:
        for group, own in zip(resumed.param_groups, settings, strict=True):
            group.update(own)

    optimizer.register_load_state_dict_post_hook(restore)
