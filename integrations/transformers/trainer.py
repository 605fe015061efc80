"""The Trainer with a distillation loss, and the mixin that makes it."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from disk_plugin import DiSKLoss
from disk_plugin.distiller import check_apart, fit_to_teacher, outputs_of, reads_student_features
from disk_plugin.distributed import SharedGuide, attach, mean_over_processes, share_statistics, split_statistics
from disk_plugin.features import Guided, Outputs
from disk_plugin.taps import FeatureTap, logits_of, with_features
from disk_plugin.training import GuidedTraining

from .epochs import GuidedEpochs
from .models import accepted, check_pair, check_trainer, is_causal, places_itself
from .state import copied, several_processes
from .tokens import aligned, count, positions_last

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object  # the mixin stands before a Trainer

STATE_NAME = "disk.pt"
_SETTINGS = frozenset(inspect.signature(DiSKLoss).parameters) - {"guide"}
_PARTS = 20  # epochs of the schedule where the host has one, or cannot tell how long one is


class DistillationMixin(_Host):
    """A Trainer whose training loss is a distillation loss guided by DiSK: ``class T(DistillationMixin, Trainer)``.

    The student is ``model``, wrapped as the Trainer wraps it. The teacher is frozen, runs without gradients on the same
    inputs, and is neither in ``model`` nor in a checkpoint. Guide and method are in the Trainer's optimizer, in
    parameter groups of their own, and beside each checkpoint's optimizer state in ``disk.pt``. Evaluation, prediction
    and saving are the Trainer's own. ``max_grad_norm`` clips the student alone.

    Args:
        *args: of the Trainer.
        **kwargs: of the Trainer, and of the ``DiSKLoss`` that is made if ``loss`` is None, such as ``temperature``.
        teacher: a model of the same classes (or vocabulary), whose output has ``logits``.
        loss: a ``DiSKLoss``, or a ``Guided`` around it and a method that reads logits or features; None for
            ``DiSKLoss`` with a ``GuideHead`` that fits the teacher.
        dual: arguments of ``DualScheduler``, but for ``epochs``.
        epoch_steps: optimizer steps between two steps of the schedule; None for the Trainer's epochs, or, if there is
            but one, for a twentieth of it. Set it where epochs are few, as in fine-tuning.

    Attributes:
        guided: loss and method, with the guide's parameters.
        guided_training: schedule and report, from the start of training on.

    Raises:
        ValueError: models or arguments that do not fit: sharded training (FSDP, DeepSpeed), other labels, a
            ``compute_loss_func``, regression or multi-label problems; in training, a batch without labels.
        TypeError: settings beside a ``loss``; an output without logits.
        RuntimeError: resuming from a checkpoint without the guide's state.
    """

    loss_is_scaled_for_ga = False  # the Trainer divides by the number of micro-batches

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        loss: DiSKLoss | Guided | None = None,
        dual: Mapping[str, Any] | None = None,
        epoch_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        settings = {name: kwargs.pop(name) for name in _SETTINGS & kwargs.keys()}
        super().__init__(*args, **kwargs)
        check_trainer(self)
        check_pair(self.model, teacher)
        check_apart(self.model, teacher)
        if epoch_steps is not None and epoch_steps < 1:
            raise ValueError(f"epoch_steps must be at least 1, got {epoch_steps}")
        smoothing = self.label_smoother.epsilon if self.label_smoother is not None else 0.0
        if loss is None and smoothing:
            settings.setdefault("label_smoothing", smoothing)
        with torch.random.fork_rng(devices=[]):  # data and dropout stay those of a run without a guide
            self.guided, self.teacher = fit_to_teacher(teacher, loss, settings)
        if smoothing and self.guided.disk.label_smoothing != smoothing:
            raise ValueError(
                f"label_smoothing must be the same in the arguments, label_smoothing_factor={smoothing}, and in the "
                f"loss, got {self.guided.disk.label_smoothing}"
            )
        if self.args.n_gpu > 1 and reads_student_features(self.guided):
            raise ValueError(f"a method that reads the student's features needs torchrun: got {self.args.n_gpu} GPUs")
        self.guided.to(self.args.device)
        if not places_itself(teacher):
            self.teacher.to(self.args.device)
        # the loss is a mean; models that take num_items_in_batch would make the Trainer expect a sum
        self.model_accepts_loss_kwargs = False
        self.dual, self.epoch_steps = dual, epoch_steps
        self.guided_training: GuidedTraining | None = None
        self._initial = copied(self.guided.state_dict()) if self.model_init is not None else None
        self._loaded: dict[str, Any] | None = None
        self._shared: SharedGuide | None = None
        self._student_tap: FeatureTap | None = None
        self._mean_count: Tensor | None = None
        self._schedule_steps: int | None = None
        self._causal = is_causal(self, self.model)
        self.add_callback(GuidedEpochs(self))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the distillation loss in training, the Trainer's own in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        training = self._started()
        names = self._label_names(inputs)
        if len(names) != 1:
            candidates = [*dict.fromkeys((*self.label_names, "labels", "label"))]
            raise ValueError(f"a training batch must hold labels under one of {candidates}, got {sorted(inputs)}")
        target = inputs[names[0]]
        inputs = {name: value for name, value in inputs.items() if name not in names}
        self._add_decoder_inputs(inputs, target)
        with torch.no_grad(), self.accelerator.autocast():
            teacher = outputs_of(self.teacher, **accepted(self.teacher, inputs))
        student, outputs = self._run_student(model, inputs)
        student, teacher = (positions_last(each, self._causal) for each in (student, teacher))
        target = aligned(target, self._causal)
        loss = training.loss(student, teacher, target)
        if self._mean_count is not None:
            loss = loss * (count(target, self.guided.disk.ignore_index) / self._mean_count).to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Count the labels of the micro-batches of a step, over all processes: each label has the same weight."""
        found = super().get_batch_samples(*args, **kwargs)
        batches, self._mean_count = found[0], None
        labels = [batch[name] for batch in batches if isinstance(batch, Mapping) for name in self._label_names(batch)]
        if labels and len(labels) == len(batches) and (len(batches) > 1 or several_processes()):
            ignored = self.guided.disk.ignore_index
            counts = [count(aligned(target, self._causal), ignored).to(self.args.device) for target in labels]
            mean = mean_over_processes(torch.stack(counts).mean())
            self._mean_count = torch.where(mean > 0, mean, 1.0)
        return found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Add guide and method to the Trainer's optimizer, with its rule of what decays."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = {
            name: parameter
            for name, parameter in self.guided.named_parameters()
            if parameter.requires_grad and id(parameter) not in known
        }
        if missing and self.lr_scheduler is not None:
            raise ValueError(
                "optimizers: the optimizer of a scheduler must hold the guide, got one without it: make the loss first "
                "and give it [*model.parameters(), *loss.parameters()], or give optimizers=(optimizer, None)"
            )
        decayed = set(self.get_decay_parameter_names(self.guided))
        for decay, weight_decay in ((True, self.args.weight_decay), (False, 0.0)):
            group = [parameter for name, parameter in missing.items() if (name in decayed) == decay]
            if group:
                optimizer.add_param_group({"params": group, "weight_decay": weight_decay})
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save guide, method and schedule beside the optimizer's state."""
        super()._save_optimizer_and_scheduler(output_dir)
        disk, state = self.guided.disk, copied(self._started().state_dict())
        if several_processes():  # within an epoch each rank has seen a part
            kept = disk.epoch_statistics.clone(), disk.epoch_batches.clone()
            share_statistics(disk)
            state["disk"]["epoch_statistics"] = disk.epoch_statistics.clone()
            disk.epoch_statistics.copy_(kept[0])
            disk.epoch_batches.copy_(kept[1])
        if self.args.should_save:
            torch.save(state, Path(output_dir, STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read guide, method and schedule; they are loaded once the schedule's length is known."""
        if checkpoint is not None:
            path = Path(checkpoint, STATE_NAME)
            if not path.is_file():
                raise RuntimeError(f"resume without the guide's state: {checkpoint} holds no {STATE_NAME}")
            self._loaded = torch.load(path, map_location="cpu", weights_only=True)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _begin_training(self) -> None:
        """Make the schedule, whose length the Trainer knows only now, and load a checkpoint's state."""
        state, self._mean_count = self.state, None
        steps = self.epoch_steps
        whole = state.num_train_epochs == 1 or state.num_train_epochs > state.max_steps  # the latter without a length
        if steps is None and whole:
            steps = math.ceil(state.max_steps / _PARTS)
        epochs = state.num_train_epochs if steps is None else math.ceil(state.max_steps / steps)
        self.guided.train()
        if self._initial is not None and self._loaded is None:  # model_init has made a new student
            self.guided.load_state_dict(self._initial)
        self.guided_training = GuidedTraining(self.guided, epochs=epochs, dual=self.dual)
        if self._shared is None and several_processes():
            self._shared = attach(self.guided)
        if self._loaded is not None:
            self.guided_training.load_state_dict(self._loaded)
            split_statistics(self.guided.disk)
            self._loaded = None
        self.guided.zero_grad()
        self._schedule_steps = steps

    def _started(self) -> GuidedTraining:
        if self.guided_training is None:
            raise RuntimeError("the distillation loss needs train() to have begun, got a training batch before it")
        return self.guided_training

    def _end_epoch(self, *, complete: bool) -> None:
        """Log an epoch's means; an incomplete epoch continues when the run is resumed."""
        training = self._started()
        means = training.end_epoch() if complete else training.means()
        self.log({f"disk_{name}": value for name, value in means.items() if math.isfinite(value)})

    def _label_names(self, inputs: Mapping[str, Any]) -> list[str]:
        """Return under which names a batch holds labels."""
        names = dict.fromkeys((*self.label_names, "labels", "label"))
        return [name for name in names if isinstance(inputs.get(name), Tensor)]

    def _add_decoder_inputs(self, inputs: dict[str, Any], target: Tensor) -> None:
        """Make what an encoder-decoder makes of the labels by itself, which are taken out."""
        make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if make is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
            inputs["decoder_input_ids"] = make(labels=target)

    def _run_student(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Outputs, Any]:
        """Run the student; return its outputs, with features by hooks inside any wrapper, and its own output."""
        if not reads_student_features(self.guided):
            outputs = model(**inputs)
            return Outputs(logits_of(outputs)), outputs
        if self._student_tap is None or self._student_tap.model is not model:
            self._student_tap = with_features(model)
        shown = outputs_of(self._student_tap, **inputs)
        return shown, {"logits": shown.logits}


class DiSKTrainer(DistillationMixin, Trainer):
    """The Trainer with a distillation loss guided by DiSK: see ``DistillationMixin``."""
