"""The host's trainers, and Algorithm 1 as one more: ``SOLVER.TRAINER disk``."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from mdistiller.engine import trainer as host
from mdistiller.engine import trainer_dict, utils
from mdistiller.engine.utils import log_msg
from torch import Tensor
from tqdm import tqdm

from disk_plugin.training import GuidedTraining, GuidePasses

from . import alternating
from .checkpoints import load_tensors, save_atomically
from .complete_trainer import CompleteTrainer, keep_settings
from .distillers import GuidedDistiller
from .seeds import apart, restart_workers


class DISKTrainer(CompleteTrainer):
    """Algorithm 1 of Kag et al. (ICLR 2023): guide passes with the student fixed, then student passes (epochs).

    Its section is ``DISK.ALTERNATING``. ``SOLVER.EPOCHS`` counts student passes, so learning rates and comparisons are
    the host's. Before every ``STUDENT_PASSES`` epochs come ``GUIDE_PASSES`` passes of the guide's own optimizer over
    the same loader, before the first epoch also ``GUIDE_WARMUP_EPOCHS``. Multiplier and budget change from one outer
    iteration to the next, as in the paper: lengths in ``DISK.DUAL`` count iterations. In a guide pass the student is in
    evaluation mode. With ``REPLAY`` only the first iteration's guide passes are over the loader; the others are on a
    record of the last student pass before them, in which the student is in training mode.
    """

    def __init__(self, experiment_name: str, distiller: Any, train_loader: Any, val_loader: Any, cfg: Any) -> None:
        module = distiller.module
        if not isinstance(module, GuidedDistiller):
            raise ValueError(f"SOLVER.TRAINER disk needs a DISTILLER.TYPE with a guide, got {cfg.DISTILLER.TYPE}")
        self.guide_optimizer = alternating.build_guide_optimizer(cfg, module.disk)
        keep_settings(self.guide_optimizer)
        super().__init__(experiment_name, distiller, train_loader, val_loader, cfg)

    def guided_training(self, module: GuidedDistiller, **core: Any) -> GuidedTraining:
        """Build guided training with Algorithm 1's passes, whose state is saved with the module's."""
        recipe, seed = alternating.build_recipe(self.cfg), self.cfg.SOLVER.SEED or 0
        own = {"recipe": recipe, "guide_optimizer": self.guide_optimizer, "guide_rate": self._guide_rate, "seed": seed}
        training = super().guided_training(module, **own, **core)
        self.passes = cast(GuidePasses, training.guide_passes)
        if self.passes.replay is None:
            module.stateful["guide_optimizer"] = self.guide_optimizer
        else:  # the record holds the optimizer
            module.stateful["replay"] = self.passes.replay
        return training

    def before_epoch(self, epoch: int) -> None:
        """Run the guide's passes if an outer iteration of Algorithm 1 begins."""
        self.passes.set_rate(epoch - 1)
        self.distiller.module.set_epoch(epoch)  # the multiplier of the student's passes that follow
        made = self.passes.run(epoch - 1, self._bars(epoch), self._guide_loss(epoch), fresh=epoch == 1)
        self.guide_turn = False
        if made:
            restart_workers(self.train_loader)
            self.judge_teacher(epoch)
            self.restart_report()

    def log(self, lr: float, epoch: int, log_dict: dict[str, Any]) -> None:
        """Log and end the epoch; with a record, run the next epoch's guide passes here, before the host saves.

        After the last epoch there are none; the record is saved, for a run that is extended.
        """
        super().log(lr, epoch, log_dict)
        if self.passes.recipe.ends_iteration(epoch - 1) and epoch < self.cfg.SOLVER.EPOCHS:
            self.distiller.module.set_epoch(epoch + 1)
            self.passes.run_replay(epoch)

    def _guide_rate(self, epoch: int) -> float:
        """Return the guide's learning rate, decayed by the factor of the student's."""
        lr = host.adjust_learning_rate(epoch + 1, self.cfg, self.guide_optimizer)
        factor = lr / self.cfg.SOLVER.LR if self.cfg.SOLVER.LR else 1.0
        return float(self.cfg.DISK.ALTERNATING.LR * factor)

    def _bars(self, epoch: int) -> Callable[[int], Iterator[Iterable[Any]]]:
        """Yield the batches of guide passes, after which the student sees those of a run without guide passes."""

        def bars(count: int) -> Iterator[Iterable[Any]]:
            module = self.distiller.module
            self.distiller.train()
            module.disk.guide.train()
            module.student.eval()
            if module.method is not None:
                module.method.eval()
            self.guide_turn = True
            for number in range(1, count + 1):
                with apart(number):
                    restart_workers(self.train_loader)
                    self._bar = tqdm(self.train_loader)
                    self._bar_name = f"{number}/{count}"
                    yield self._bar
                    self._bar.close()

        return bars

    def _guide_loss(self, epoch: int) -> Callable[[Any], Tensor]:
        def guide_loss(batch: Any) -> Tensor:
            image, target = (value.cuda(non_blocking=True) for value in (batch[0].float(), batch[1]))
            with torch.no_grad():
                logits, inputs = self.distiller(image=image, target=target, epoch=epoch)
            terms = self.distiller.module.terms(logits, target, inputs, epoch)
            self._add(terms, logits.shape[1])
            self._bar.set_description(
                log_msg(f"Epoch:{epoch}| Guide pass:{self._bar_name}{self._epoch_message()}", "TRAIN")
            )
            return terms.mean().guide_loss

        return guide_loss


def add() -> None:
    """Replace the host's trainers by complete ones, add ``disk``, and repair what breaks saving and resuming."""
    for name, trainer in list(trainer_dict.items()):
        if not isinstance(trainer, type):
            continue
        if issubclass(trainer, host.BaseTrainer) and not issubclass(trainer, CompleteTrainer):
            trainer_dict[name] = type(trainer.__name__, (CompleteTrainer, trainer), {"__doc__": trainer.__doc__})
    trainer_dict["disk"] = DISKTrainer
    if host.save_checkpoint is save_atomically:
        return
    host.save_checkpoint = save_atomically
    host.load_checkpoint = utils.load_checkpoint = load_tensors  # tools/train.py imports it from there
    host.adjust_learning_rate = _with_float_rates(host.adjust_learning_rate)


def _with_float_rates(adjust: Callable[..., Any]) -> Callable[..., float | None]:
    """Let the host decay its rates, and keep them Python floats: torch refuses to load a NumPy scalar."""

    @functools.wraps(adjust)
    def adjust_learning_rate(*args: Any, **kwargs: Any) -> float | None:
        rate = adjust(*args, **kwargs)
        for optimizer in (*args, *kwargs.values()):
            for group in optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else ():
                group["lr"] = float(group["lr"])
        return None if rate is None else float(rate)

    return adjust_learning_rate


def check_rates() -> None:
    """Validate that the guide's rate can follow the host's.

    Raises:
        ValueError: the host's ``adjust_learning_rate`` takes other arguments.
    """
    taken = list(inspect.signature(host.adjust_learning_rate).parameters)
    if taken != ["epoch", "cfg", "optimizer"]:
        raise ValueError(
            f"SOLVER.TRAINER disk needs the host's adjust_learning_rate(epoch, cfg, optimizer), which takes "
            f"({', '.join(taken)}) here: train jointly, by SOLVER.TRAINER base"
        )
