"""The host's trainers, and Algorithm 1 as one more: ``SOLVER.TRAINER disk``."""

from collections.abc import Callable
from typing import Any

import torch
from mdistiller.engine import trainer as host
from mdistiller.engine import trainer_dict
from mdistiller.engine.utils import log_msg
from tqdm import tqdm

from disk_plugin.epoch_report import EpochReport
from disk_plugin.replay import GuideReplay

from . import config
from .checkpoints import save_atomically
from .complete_trainer import CompleteTrainer, keep_settings
from .distillers import DISK_SIMKD, GuidedDistiller
from .seeds import apart, restart_workers


class DISKTrainer(CompleteTrainer):
    """Algorithm 1 of Kag et al. (ICLR 2023): guide passes with the student fixed, then student passes (epochs).

    Section ``DISK.ALTERNATING``. ``SOLVER.EPOCHS`` counts student passes, so that learning rates and comparisons stay
    the host's; before the first of each ``STUDENT_PASSES`` epochs come ``GUIDE_PASSES`` passes of the guide's own
    optimizer over the same loader, and before the first epoch also ``GUIDE_WARMUP_EPOCHS``. Multiplier and budget
    change from one outer iteration to the next, as in the paper: the lengths in ``DISK.DUAL`` count those. In a guide
    pass the student is in evaluation mode. With ``REPLAY`` only the first iteration's guide passes are over the loader,
    the others on a record of the last student pass before them, where the student is in training mode.
    """

    def __init__(self, experiment_name: str, distiller: Any, train_loader: Any, val_loader: Any, cfg: Any) -> None:
        module = distiller.module
        if not isinstance(module, GuidedDistiller):
            raise ValueError(f"SOLVER.TRAINER disk needs DISTILLER.TYPE DISK or DISK_SIMKD, got {cfg.DISTILLER.TYPE}")
        self.guide_optimizer = config.build_guide_optimizer(cfg, module.disk)
        keep_settings(self.guide_optimizer)
        self.replay = config.build_replay(cfg, module.disk, self.guide_optimizer)
        if self.replay is None:
            module.stateful["guide_optimizer"] = self.guide_optimizer
        else:  # which holds the optimizer
            module.stateful["replay"] = self.replay
        super().__init__(experiment_name, distiller, train_loader, val_loader, cfg)

    def before_epoch(self, epoch: int) -> None:
        """Run the guide's passes where an outer iteration of Algorithm 1 begins."""
        settings, module = self.cfg.DISK.ALTERNATING, self.distiller.module
        self._set_guide_rate(epoch)
        if self.replay is not None and len(self.replay):  # of what was the last epoch when its checkpoint was written
            self._train_on(self.replay, epoch)
        if (epoch - 1) % settings.STUDENT_PASSES or (self.replay is not None and epoch > 1):
            return
        passes = settings.GUIDE_PASSES + (settings.GUIDE_WARMUP_EPOCHS if epoch == 1 else 0)
        for number in range(1, passes + 1):
            with apart(number):  # the student sees the batches of a run without guide passes
                restart_workers(self.train_loader)
                self._guide_pass(epoch, f"{number}/{passes}")
        restart_workers(self.train_loader)
        self.judge_teacher(epoch)
        # the statistics that judge the iteration are those of the student's passes
        module.disk.reset_statistics()
        self.report = EpochReport()

    def log(self, lr: float, epoch: int, log_dict: dict[str, Any]) -> None:
        """Log and end the epoch; with a record, the guide passes before the next one come here, before the host saves.

        After the last epoch there is none to come, and the record is saved for a run that goes on to more epochs.
        """
        super().log(lr, epoch, log_dict)
        if self.replay is not None and self._ends_iteration(epoch) and epoch < self.cfg.SOLVER.EPOCHS:
            self._train_on(self.replay, epoch + 1)

    def _evaluate_losses(self, distiller: Any, images: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Record the gathered outputs too, in the last of the student's passes before the guide's."""
        losses = super()._evaluate_losses(distiller, images, kwargs, output)
        if losses is not None and self.replay is not None and self._ends_iteration(kwargs["epoch"]):
            logits, inputs = output
            self.replay.record(logits, inputs["teacher_logits"], kwargs["target"], inputs.get("teacher_features"))
        return losses

    def _ends_iteration(self, epoch: int) -> bool:
        return bool(epoch % self.cfg.DISK.ALTERNATING.STUDENT_PASSES == 0)

    def _train_on(self, replay: GuideReplay, epoch: int) -> None:
        """Make the guide's passes before an epoch on the record."""
        self._set_guide_rate(epoch)
        self.distiller.module.set_epoch(epoch)  # the multiplier of the student's passes to come
        replay.train_guide(self.cfg.DISK.ALTERNATING.GUIDE_PASSES)

    def _set_guide_rate(self, epoch: int) -> None:
        """Let the guide's rate decay by the factor of the student's, whose own optimizer stays as it is."""
        settings, lr = self.cfg.DISK.ALTERNATING, host.adjust_learning_rate(epoch, self.cfg, self.guide_optimizer)
        for group in self.guide_optimizer.param_groups:
            group["lr"] = settings.LR * (lr / self.cfg.SOLVER.LR if self.cfg.SOLVER.LR else 1.0)

    def _guide_pass(self, epoch: int, name: str) -> None:
        """Pass over the data once with the student fixed: g <- argmin of (5)."""
        module = self.distiller.module
        self.distiller.train()
        module.disk.guide.train()
        module.student.eval()
        if isinstance(module, DISK_SIMKD):
            module.simkd.eval()
        self.guide_turn = True
        bar = tqdm(self.train_loader)
        for image, target, *_ in bar:
            image, target = image.float().cuda(non_blocking=True), target.cuda(non_blocking=True)
            with torch.no_grad():
                logits, inputs = self.distiller(image=image, target=target, epoch=epoch)
            terms = module.terms(logits, target, inputs, epoch)
            self._add(terms, logits.shape[1])
            self.guide_optimizer.zero_grad()
            terms.mean().guide_loss.backward()
            self.guide_optimizer.step()
            bar.set_description(log_msg(f"Epoch:{epoch}| Guide pass:{name}{self._epoch_message()}", "TRAIN"))
        bar.close()
        self.guide_optimizer.zero_grad()
        self.guide_turn = False


def add() -> None:
    """Complete the host's trainers and add ``disk``; cure what keeps the host from saving and resuming."""
    for name, trainer in list(trainer_dict.items()):
        if issubclass(trainer, host.BaseTrainer) and not issubclass(trainer, CompleteTrainer):
            trainer_dict[name] = type(trainer.__name__, (CompleteTrainer, trainer), {"__doc__": trainer.__doc__})
    trainer_dict["disk"] = DISKTrainer
    if host.save_checkpoint is save_atomically:
        return
    host.save_checkpoint = save_atomically
    host.adjust_learning_rate = _with_float_rates(host.adjust_learning_rate)


def _with_float_rates(adjust: Callable[..., float]) -> Callable[..., float]:
    """Let the host decay its rates, and keep them Python floats: torch refuses to load a NumPy scalar."""

    def adjust_learning_rate(epoch: int, cfg: Any, optimizer: torch.optim.Optimizer) -> float:
        rate = float(adjust(epoch, cfg, optimizer))
        for group in optimizer.param_groups:
            group["lr"] = float(group["lr"])
        return rate

    return adjust_learning_rate
