"""DiSK in torchdistill >= 1.1.5: ``key: 'DiSK'`` in the criterion of its YAML files, see docs/hosts/torchdistill.md."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from disk_plugin.distributed import attach
from disk_plugin.features import Guided
from disk_plugin.guide import GuideHead, reads_features
from disk_plugin.loss import DiSKLoss
from disk_plugin.training import GuidedTraining
from disk_plugin.training.clipping import call_after_backward, shorten
from disk_plugin.uniform import UniformGuide

from .requirement import require
from .torchdistill_pair import Paths, build_for_pair, find_method

_KEY = "disk"  # in a group of the optimizer's state, where load_state_dict keeps it
_logger = logging.getLogger("torchdistill.disk_plugin")  # a child of the host's

require("torchdistill", "1.1.5", "pip install 'torchdistill>=1.1.5'")

from torchdistill.core.interfaces import post_epoch_proc, pre_epoch_proc, registry  # noqa: E402
from torchdistill.losses.registry import register_mid_level_loss  # noqa: E402


class DiSKTerm(nn.Module):
    """A term of the host's criterion, ``key: 'DiSK'``: DiSK, or any method weighted by its guide.

    Guide and method join the host's optimizer, inside whose state ``save_ckpt`` and ``load_ckpt`` carry them.

    Args:
        num_classes: C, >= 2.
        loss: arguments of ``DiSKLoss``, such as ``temperature``.
        guide: arguments of ``GuideHead``, such as ``feature_dim``, which needs ``teacher_features``.
        uniform: arguments of ``UniformGuide``, such as ``discount``, in place of a guide: the control.
        dual: keywords of ``DualScheduler``.
        epochs: over which the schedule runs; None for the host's ``num_epochs``, of several stages the stage's.
        method: ``{key, kwargs}`` of a method that the guide weighs: a name in ``METHODS`` or ``package.module.Class``;
            ``weight``, ``method_weight`` or ``logit_loss`` of ``Guided`` may stand beside them.
        student_features: path of the student's module whose input is the features; named in ``forward_hook``.
        teacher_features: the same of the teacher.
        student_maps: name of a map -> path of the student's module whose output it is.
        teacher_maps: the same of the teacher.
        image_size: (C, H, W) of the training images, for a method whose layers fit the models, such as ScaleKD: it is
            built for the two when training begins.
        param_group: index of the optimizer's parameter group that guide and method join.

    Raises:
        ValueError: values out of range, a method with a prediction of its own; in ``forward``, outputs or labels that
            are missing.
        RuntimeError: in ``forward``, the processes before and after an epoch are not the ones of this file.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        loss: Mapping[str, Any] | None = None,
        guide: Mapping[str, Any] | None = None,
        uniform: Mapping[str, Any] | None = None,
        dual: Mapping[str, Any] | None = None,
        epochs: int | None = None,
        method: Mapping[str, Any] | None = None,
        student_features: str | None = None,
        teacher_features: str | None = None,
        student_maps: Mapping[str, str] | None = None,
        teacher_maps: Mapping[str, str] | None = None,
        image_size: Sequence[int] | None = None,
        param_group: int = 0,
    ) -> None:
        super().__init__()
        if guide and uniform:
            raise ValueError(f"uniform={dict(uniform)} takes the place of guide={dict(guide)}: give one of them")
        head = GuideHead(num_classes, **(guide or {})) if uniform is None else UniformGuide(**uniform)
        disk = DiSKLoss(head, **(loss or {}))
        self.guided, self._build = Guided(disk), None
        if method is not None:
            kind, kwargs, settings = find_method(method)
            if image_size is None:
                self.guided = Guided(disk, kind(**kwargs), **settings)
            else:
                self._build = kind, kwargs, settings, image_size
        self.num_classes, self.dual, self.epochs, self.param_group = num_classes, dual, epochs, param_group
        self.student_paths = Paths("student", student_features, dict(student_maps or {}))
        self.teacher_paths = Paths("teacher", teacher_features, dict(teacher_maps or {}))
        if reads_features(disk.guide) and teacher_features is None:
            raise ValueError("a guide with feature_dim needs teacher_features, the path of the module that reads them")
        self.run: _Run | None = None

    def fit_to(self, student: nn.Module, teacher: nn.Module, device: torch.device) -> None:
        """Build a method that is for a pair, once."""
        if self._build is None:
            return
        kind, kwargs, settings, image_size = self._build
        paths = self.student_paths, self.teacher_paths
        method = build_for_pair(kind, (student, teacher), paths, image_size, device, kwargs)
        self.guided, self._build = Guided(self.guided.disk, method, **settings), None
        count = sum(parameter.numel() for parameter in method.trainable_parameters())
        _logger.info(f"DiSK: {kind.__name__} trains {count:,} parameters of its own beside the student's")

    def forward(self, student_io_dict: Any, teacher_io_dict: Any, targets: Any) -> Tensor:
        """Return the loss of a training batch."""
        if self.run is None:
            raise RuntimeError(
                "DiSK needs pre_epoch_process: 'disk_pre_epoch_process' and post_epoch_process: "
                "'disk_post_epoch_process' in the train section"
            )
        if not isinstance(targets, Tensor):
            raise ValueError(f"DiSK needs labels, got targets of type {type(targets).__name__}")
        student = self.student_paths.outputs(student_io_dict, self.run.student)
        teacher = self.teacher_paths.outputs(teacher_io_dict)
        loss = self.run.training.loss(student, teacher, targets)
        if self.run.clips and loss.requires_grad:
            call_after_backward(loss, self.run.shorten)
        return loss


class _Run:
    """A term in a box: guide and method in its optimizer and in its optimizer's state."""

    def __init__(self, term: DiSKTerm, box: Any, epoch: int) -> None:
        if box.accelerator is not None:
            raise RuntimeError("DiSK is not trained under accelerate, whose optimizer hides the one that it wraps")
        if box.teacher_updatable:
            raise ValueError("the teacher would be trained: set requires_grad: False in the teacher's section")
        self.student = _bare(box.student_model)
        term.fit_to(self.student, _bare(box.teacher_model), box.device)
        self.optimizer, self.guided = box.optimizer, term.guided.to(box.device).train()
        last = getattr(box, "stage_end_epoch", None)  # of several stages
        self.first = 0 if last is None else box.current_epoch
        epochs = (box.num_epochs if last is None else last) - self.first
        self.training = GuidedTraining(
            self.guided, epochs=epochs if term.epochs is None else term.epochs, dual=term.dual
        )
        if self.training.schedule.note is not None:
            _logger.warning(f"DiSK: {self.training.schedule.note}")
        self.index = term.param_group
        self.parameters = self.guided.trainable_parameters()
        self.clips = box.max_grad_norm is not None
        self.epoch = epoch
        saved = self.group.pop(_KEY, None)
        if saved is None and (epoch > self.first or self.optimizer.state):
            raise RuntimeError(
                "the optimizer's state holds none of DiSK's guide: a run without DiSK cannot be resumed with it, nor "
                "can an optimizer be used that makes its state when it is constructed, as Adagrad does"
            )
        if box.distributed:
            attach(self.guided)
        self.group["params"].extend(self.parameters)
        if saved is not None:
            self._load(saved)
        self.optimizer.register_state_dict_pre_hook(self._before_state_dict)
        self.optimizer.register_state_dict_post_hook(self._after_state_dict)

    @property
    def group(self) -> Any:
        """The optimizer's group, which a loaded state replaces."""
        return self.optimizer.param_groups[self.index]

    def shorten(self) -> None:
        """Shorten the guide's gradient to the student's, before both are clipped by one norm."""
        guide = set(self.guided.disk.parameters())
        rest = (each for group in self.optimizer.param_groups for each in group["params"] if each not in guide)
        shorten(guide, rest)

    def _load(self, saved: dict[str, Any]) -> None:
        if saved["epoch"] + 1 != self.epoch:
            _logger.warning(
                f"DiSK: the checkpoint was saved in epoch {saved['epoch']}, counted from 0, and the run goes on with "
                f"epoch {self.epoch}: is --start_epoch {saved['epoch'] + 1} missing?"
            )
        self.training.load_state_dict(saved["training"])
        for parameter, state in zip(self.parameters, saved["optimizer"], strict=True):
            if state is not None:
                self.optimizer.state[parameter] = {
                    name: value.to(parameter.device) if isinstance(value, Tensor) and name != "step" else value
                    for name, value in state.items()
                }

    def _before_state_dict(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the parameters out: a host loads the state before they have joined."""
        own = set(self.parameters)
        self.group["params"][:] = [parameter for parameter in self.group["params"] if parameter not in own]
        self._states: Any = {each: optimizer.state.pop(each) for each in self.parameters if each in optimizer.state}

    def _after_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        self.group["params"].extend(self.parameters)
        optimizer.state.update(self._states)
        state_dict["param_groups"][self.index][_KEY] = {
            "training": self.training.state_dict(),
            "optimizer": [self._states.get(parameter) for parameter in self.parameters],
            "epoch": self.epoch,
        }


def _bare(model: nn.Module) -> nn.Module:
    found: nn.Module = model.module if isinstance(model, DistributedDataParallel | nn.DataParallel) else model
    return found


def _term_of(box: Any) -> DiSKTerm:
    terms = [term for term, _ in getattr(box.criterion, "term_dict", {}).values() if isinstance(term, DiSKTerm)]
    if len(terms) != 1:
        raise ValueError(f"the criterion needs one term with key: 'DiSK', got {len(terms)}")
    return terms[0]


def pre_epoch_process(self: Any, epoch: int, **kwargs: Any) -> None:
    """Begin an epoch: the host's default, the teacher in evaluation mode, the schedule."""
    pre_epoch_proc.default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    self.teacher_model.eval()  # the host leaves it as it was built
    term = _term_of(self)
    if term.run is None or term.run.optimizer is not self.optimizer:
        term.run = _Run(term, self, epoch)
    term.run.epoch = epoch
    term.run.training.begin_epoch(epoch - term.run.first)


def post_epoch_process(self: Any, metrics: Any = None, **kwargs: Any) -> None:
    """End an epoch: the host's default, the schedule, a line in the log."""
    post_epoch_proc.default_post_epoch_process_with_teacher(self, metrics=metrics, **kwargs)
    term = _term_of(self)
    run: Any = term.run  # without one the first batch has raised
    if run.epoch == run.first:
        weak = run.training.report.weak_teacher(term.num_classes)
        if weak is not None:
            _logger.warning(f"DiSK: {weak}")
    means = run.training.end_epoch()
    _logger.info("DiSK: %s", "  ".join(f"{name}: {value:.4g}" for name, value in means.items()))


register_mid_level_loss(DiSKTerm, key="DiSK")
registry.register_pre_epoch_proc_func(pre_epoch_process, key="disk_pre_epoch_process")
registry.register_post_epoch_proc_func(post_epoch_process, key="disk_post_epoch_process")
