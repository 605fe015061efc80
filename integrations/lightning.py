"""DiSK in Lightning >= 2.2, as ``lightning`` or ``pytorch_lightning``: one callback, ``DiSKCallback(teacher)``."""

import sys
import types
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from disk_plugin.distiller import fit_to_teacher, outputs_of, reads_student_features
from disk_plugin.distributed import SharedGuide, attach
from disk_plugin.features.guided import Guided
from disk_plugin.loss import DiSKLoss
from disk_plugin.taps import with_features
from disk_plugin.training import GuidedTraining
from disk_plugin.training.clipping import shorten

from .requirement import is_older

_PIP = "pip install 'lightning>=2.2'"


def _host() -> Any:
    """Import the one of Lightning's two packages that the program has imported, or else the one that is installed."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            host = import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
            continue
        if is_older(host.__version__, "2.2"):
            raise ImportError(f"disk_plugin.integrations.lightning needs {name} >= 2.2, got {host.__version__}: {_PIP}")
        return host
    raise ImportError(f"disk_plugin.integrations.lightning needs lightning >= 2.2, found none: {_PIP}")


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = _host().Callback
_strategies = import_module(f"{Callback.__module__.partition('.callbacks')[0]}.strategies")


def pair_of(batch: Any) -> tuple[Any, Any]:
    """Take a batch as (x, target), which is what ``unpack`` does by default."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else ""
        raise ValueError(
            f"a batch must be (x, target), got a {type(batch).__name__}{size}: give DiSKCallback "
            f"unpack=function(batch) -> (x, target)"
        )
    return batch[0], batch[1]


class DiSKCallback(Callback):
    """Trains a ``LightningModule`` with DiSK: ``Trainer(callbacks=[DiSKCallback(teacher)])``.

    While ``fit`` trains, the module's ``training_step`` is replaced by one that evaluates the module on x and returns
    DiSK's loss; everything else of it stays. The teacher is frozen, in evaluation mode, on the module's device, and
    neither in the module nor in a checkpoint. The guide's parameters join the optimizer's parameter group. Checkpoints
    hold the bare student as ``state_dict``, and guide and schedule under ``callbacks``, from where
    ``fit(ckpt_path=...)`` resumes them. Means of each epoch are logged as ``disk_...``.

    Args:
        teacher: a classifier of the same classes, called as ``teacher(x)``; no part of the module.
        loss: a ``DiSKLoss``, or a ``Guided`` around it and a method that reads logits or features; None for
            ``DiSKLoss`` with a ``GuideHead`` that fits the teacher.
        epochs: over which the schedule runs; None for the trainer's ``max_epochs``.
        unpack: batch -> (x, target), of a batch that is not such a pair.
        dual: keywords of ``DualScheduler``.
        param_group: index of the optimizer's parameter group whose learning rate and weight decay the guide gets;
            parameters that ``configure_optimizers`` has put into a group stay there.
        settings: arguments of the ``DiSKLoss`` that is made where ``loss`` is None, such as ``temperature``.

    Attributes:
        training: the run as ``disk_plugin.training.GuidedTraining``; None before the first ``fit``.

    Raises:
        ValueError: in ``fit``, a teacher inside the module, no number of epochs, an optimizer that cannot take the
            guide's parameters; in a step, a batch that ``unpack`` cannot read or that has no labels.
        TypeError: ``loss`` is of another type; settings beside a ``loss``; in a step, an output without logits.
        RuntimeError: in ``fit``, manual optimization, several optimizers, a strategy that shards the model, a resumed
            checkpoint without the guide.
    """

    def __init__(
        self,
        teacher: nn.Module,
        loss: DiSKLoss | Guided | None = None,
        *,
        epochs: int | None = None,
        unpack: Callable[[Any], tuple[Any, Any]] = pair_of,
        dual: Mapping[str, Any] | None = None,
        param_group: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a Module, got {type(teacher).__name__}")
        self.guided, self.teacher = fit_to_teacher(teacher, loss, settings)
        self.training: Any = None  # a GuidedTraining
        self.epochs, self.unpack, self.dual, self.param_group = epochs, unpack, dual, param_group
        self._student: Any = None
        self._shared: SharedGuide | None = None
        self._replaced: dict[str, Any] | None = None  # the module's own training_step, if it was an attribute of it
        self._loaded, self._judged, self._num_classes = False, False, 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replace the training step, before a checkpoint is loaded."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise RuntimeError("DiSK replaces training_step, which manual optimization needs: use Distiller in yours")
        teachers = set(self.teacher.modules())
        if any(module in teachers for module in pl_module.modules()):
            raise ValueError(
                "the teacher is part of the LightningModule, which would save and train it: keep it outside, and give "
                "it to DiSKCallback alone"
            )
        if not isinstance(trainer.strategy, _strategies.SingleDeviceStrategy | _strategies.DDPStrategy):
            raise RuntimeError(f"DiSK trains on one device or with DDP, got {type(trainer.strategy).__name__}")
        self.training = GuidedTraining(self.guided.train(), epochs=self._epochs_of(trainer), dual=self.dual)
        self.training.schedule.warn()
        self._loaded = self._judged = False
        self._student = with_features(pl_module) if reads_student_features(self.guided) else pl_module
        self._replace_step(trainer, pl_module)

    def _epochs_of(self, trainer: Any) -> int:
        epochs = trainer.max_epochs if self.epochs is None else self.epochs
        if epochs is None or epochs < 1:
            raise ValueError(
                f"the schedule needs a number of epochs: Trainer(max_epochs=...) or DiSKCallback(epochs=...), got "
                f"{epochs}"
            )
        return int(epochs)

    def _replace_step(self, trainer: Any, pl_module: Any) -> None:
        own = pl_module.training_step

        def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
            # a validation_step may call it for the module's own loss
            return self._step(batch) if trainer.training else own(batch, batch_idx)

        self._replaced = {name: value for name, value in vars(pl_module).items() if name == "training_step"}
        pl_module.training_step = types.MethodType(training_step, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the guide into the optimizer, before the optimizer's state is loaded."""
        if trainer.ckpt_path is not None and not self._loaded:
            raise RuntimeError(
                f"{trainer.ckpt_path} holds no state of {self.state_key}, as it was saved without this callback: to "
                f"start from its weights, load them into the module and call fit without ckpt_path"
            )
        self.guided.to(pl_module.device)
        self.teacher = trainer.precision_plugin.convert_module(self.teacher).to(pl_module.device).eval()
        if trainer.world_size > 1:
            self._shared = attach(self.guided)
        self._join(trainer.optimizers)

    def _join(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Add to a group: schedulers, which count groups, exist already."""
        trained = [optimizer for optimizer in optimizers if optimizer.param_groups]  # Lightning has a stand-in for none
        if len(trained) != 1:
            raise RuntimeError(f"DiSK trains by one optimizer, got {len(trained)}")
        optimizer = trained[0]
        present = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        named = {
            name: parameter
            for name, parameter in self.guided.named_parameters()
            if parameter.requires_grad and parameter not in present
        }
        if not named:
            return
        if optimizer.state:
            raise ValueError(
                f"{type(optimizer).__name__} has its state already, without the guide's: put "
                f"callback.guided.parameters() into the group that configure_optimizers makes"
            )
        group = optimizer.param_groups[self.param_group]
        group["params"].extend(named.values())
        if "param_names" in group:
            group["param_names"].extend(f"disk.{name}" for name in named)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its own training step back."""
        self._restore_step(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give it back when fit is interrupted, too."""
        self._restore_step(pl_module)

    def _restore_step(self, pl_module: Any) -> None:
        if self._replaced is not None:
            del pl_module.training_step
            vars(pl_module).update(self._replaced)
        if self._shared is not None:
            self._shared.detach()
        self._replaced = self._shared = None

    def _step(self, batch: Any) -> Tensor:
        """Return the loss of a training batch."""
        if not torch.is_grad_enabled():
            raise RuntimeError("training_step was called without gradients while training: it would report the batch")
        x, target = self.unpack(batch)
        if not isinstance(target, Tensor):
            raise ValueError(f"DiSK needs labels, got a target of type {type(target).__name__}")
        with torch.no_grad():
            teacher = outputs_of(self.teacher, x)
        self._num_classes = teacher.logits.shape[1]
        return self.training.loss(outputs_of(self._student, x), teacher, target)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Bring the schedule to where a resumed run starts: within an epoch no epoch starts."""
        self.training.begin_epoch(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin an epoch."""
        self.teacher.eval()
        self.training.begin_epoch(trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Shorten the guide's gradient before both are clipped by one norm."""
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            shorten(self.guided.disk.parameters(), pl_module.parameters())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Step the schedule and log the epoch's means."""
        training = self.training
        if not self._judged and trainer.is_global_zero and self._num_classes > 1:
            weak = training.report.weak_teacher(self._num_classes, beside_student=trainer.current_epoch == 0)
            if weak is not None:
                warnings.warn(weak, stacklevel=2)
        self._judged = True
        for name, value in training.end_epoch().items():
            pl_module.log(f"disk_{name}", value, prog_bar=name == "logged_loss", sync_dist=trainer.world_size > 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of guide, method and schedule, which Lightning keeps beside the module's."""
        return {} if self.training is None else self.training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it: Lightning calls this when ``fit`` resumes."""
        if self.training is not None:  # else by validate or test, which need nothing of it
            self.training.load_state_dict(state_dict)
            self._loaded = True
