"""What the launcher replaces in train.py's namespace: the task, an epoch's schedule and log, resuming."""

import argparse
import logging
import sys
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.utils import is_primary, unwrap_model

from . import flags
from .guided_task import GuidedTask
from .method_stage import prepare_method
from .normalisation import per_channel
from .resume import resume_task
from .task import DiSKTask
from .teacher_checkpoint import load_teacher

_logger = logging.getLogger("train")


def prepare(train: Any) -> None:
    """Add the flags to the script's parser, and replace its functions for task, epoch and checkpoint."""
    flags.add(train.parser)
    seen: dict[str, argparse.Namespace] = {}
    parse, train_one_epoch, resume = train._parse_args, train.train_one_epoch, train.resume_task_checkpoint

    def parse_args() -> tuple[argparse.Namespace, str]:
        args, text = parse()
        _or_exit(flags.check, args)
        seen["args"] = args
        return args, text

    def make_task(**host: Any) -> GuidedTask:
        return _or_exit(_make_task, train, seen["args"], **host)

    def resume_checkpoint(task: GuidedTask, path: str, **how: Any) -> Any:
        return _or_exit(resume_task, resume, seen["args"], task, path, **how)

    def one_epoch(epoch: int, model: Any, loader: Any, optimizer: Any, args: Any, **around: Any) -> dict[str, float]:
        task = around["task"]
        _prepare_method(loader, args, **around)
        task.begin_epoch(epoch)
        _guide_passes(loader, args, **around)
        metrics = train_one_epoch(epoch, model, loader, optimizer, args, **around)
        means = task.end_epoch()
        if is_primary(args):
            _logger.info(f"DiSK: {epoch} " + "  ".join(f"{name}: {value:.4g}" for name, value in means.items()))
        return _ranked(args, metrics, means)

    train._parse_args, train.LogitDistillationTask = parse_args, make_task
    train.train_one_epoch = one_epoch
    train.resume_task_checkpoint = resume_checkpoint


def _make_task(
    train: Any, args: argparse.Namespace, *, student_model: Any, teacher_model: Any, **host: Any
) -> GuidedTask:
    if args.disk_teacher_checkpoint:
        factory = {"device": host.get("device"), "dtype": host.get("dtype")}
        teacher_model = load_teacher(teacher_model, args.disk_teacher_checkpoint, student_model, **factory)
    elif is_primary(args) and not str(teacher_model).startswith("local-dir:"):
        _logger.info(f"Teacher {teacher_model}: timm's pretrained weights (offline: --disk-teacher-checkpoint FILE)")
    data = resolve_data_config(vars(args), model=unwrap_model(student_model), verbose=False)
    arguments = flags.task_arguments(args, epochs=_epochs(train, args))
    images: dict[str, Any] = {"input_size": tuple(data["input_size"])}
    images |= {f"input_{name}": per_channel(data[name], images["input_size"][0]) for name in ("mean", "std")}
    task = DiSKTask(student_model, teacher_model, **images, **host, **arguments)
    task.clips_by_norm = getattr(args, "clip_mode", "norm") == "norm"
    if is_primary(args):
        _describe(task, args)
    return task


def _ranked(args: argparse.Namespace, metrics: dict[str, float], means: dict[str, float]) -> dict[str, float]:
    """Add DiSK's means to the host's metrics.

    Without a validation split the host ranks checkpoints by ``loss``. The whole loss moves with the multiplier,
    whatever the student does, so there the task loss replaces it.
    """
    if not _validates(args):
        means = {"loss": metrics["loss"], **means}
        metrics["loss"] = means["task_loss"]
    metrics.update({f"disk_{name}": value for name, value in means.items()})
    return metrics


def _validates(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "val_split", True))


def _describe(task: GuidedTask, args: argparse.Namespace) -> None:
    dual: Any = task.dual  # the launcher always gives epochs
    added = sum(parameter.numel() for parameter in task.disk.parameters())
    _logger.info(f"DiSK: {args.disk_mode}, schedules of {dual.epochs} steps, guide of {added} parameters")
    method = task.training_core.guided.method
    trained = 0 if method is None else sum(each.numel() for each in method.trainable_parameters())
    if trained:
        _logger.info(f"DiSK: {type(method).__name__} trains {trained:,} parameters of its own beside the student's")
    teachers = task.teacher.mean_kd, task.teacher.std_kd
    sides = {"images": (task.student_mean, task.student_std), "teacher's own": teachers}
    shown = [f"{side} mean {_rounded(mean)}, std {_rounded(std)}" for side, (mean, std) in sides.items()]
    _logger.info(f"DiSK: {'; '.join(shown)}")
    if not _validates(args):
        _logger.info("DiSK: no validation split: loss, which ranks the checkpoints, is the task loss alone")
    if dual.note is not None:
        _logger.warning(f"DiSK: {dual.note}")


def _rounded(values: torch.Tensor) -> str:
    return " ".join(f"{value:.3g}" for value in values.flatten().tolist())


def _epochs(train: Any, args: argparse.Namespace) -> int:
    """Return the number of epochs by the host's own scheduler factory; cool-down and warm-up may add some."""
    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    _, epochs = train.create_scheduler_v2(nothing, **train.scheduler_kwargs(args), updates_per_epoch=1)
    return int(epochs)


def _to_device(
    args: argparse.Namespace, *, device: torch.device, model_dtype: torch.dtype | None, mixup_fn: Any, **_: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return what the host does to a batch of its loader before the models see it."""

    def to_device(image: Any, target: Any) -> tuple[Any, Any]:
        if not args.prefetcher:
            image, target = image.to(device=device, dtype=model_dtype), target.to(device=device)
            if mixup_fn is not None:
                image, target = mixup_fn(image, target)
        if args.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return image, target

    return to_device


def _prepare_method(loader: Any, args: argparse.Namespace, **around: Any) -> None:
    """Run a method's stage before training, in the first epoch of a run that was not resumed."""
    how = {"prepare": _to_device(args, **around), "autocast": around["amp_autocast"], "progress": is_primary(args)}
    report = prepare_method(around["task"], loader, **how)
    if report and is_primary(args):
        _logger.info(f"DiSK: {args.disk_method} before training:\n{report}")


def _guide_passes(loader: Any, args: argparse.Namespace, **around: Any) -> None:
    task, mixup_fn = around["task"], around["mixup_fn"]
    if getattr(args, "mixup_off_epoch", 0) and task.schedule.epoch >= args.mixup_off_epoch:
        # as the host does at the start of the student's pass
        (loader if args.prefetcher else mixup_fn).mixup_enabled = False
    passes = task.run_guide_passes(loader, prepare=_to_device(args, **around), autocast=around["amp_autocast"])
    if passes and is_primary(args):
        _logger.info(f"DiSK: {task.schedule.epoch} {passes} guide passes")


def _or_exit(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Exit with the message of an error that the user can correct; nothing has been written yet."""
    try:
        return call(*arguments, **keywords)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, EOFError, UnpicklingError) as error:
        _logger.debug("stopped by an error", exc_info=True)
        sys.exit(f"error: {str(error) or type(error).__name__}")
