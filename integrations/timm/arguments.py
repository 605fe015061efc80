"""The arguments of ``DiSKTask``: which keyword goes where, and which do not go together."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from timm.loss import BinaryCrossEntropy, JsdCrossEntropy
from timm.task import LogitDistillationTask
from timm.utils import unwrap_model
from torch import nn

from disk_plugin import DiSKLoss, _checks
from disk_plugin.distiller import check_apart
from disk_plugin.features.method import Method

from .flags import INCOMPATIBLE

_TEMPERATURE = inspect.signature(DiSKLoss).parameters["temperature"].default
_OF_CROSS_ENTROPY = {"weight", "label_smoothing"}  # of the loss's own, which has weight 0: the criterion is the host's
_LOSS = {name for name, p in inspect.signature(DiSKLoss).parameters.items() if p.kind is p.KEYWORD_ONLY}
_LOSS -= _OF_CROSS_ENTROPY
_HOST = set(inspect.signature(LogitDistillationTask.__init__).parameters) - {"self"}


def split(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keywords into timm's and the loss's; the loss's two weights are renamed to timm's.

    Raises:
        ValueError: a weight given under both names.
        TypeError: unknown keywords.
    """
    settings = {"temperature": _TEMPERATURE, **settings}  # timm's own default, 1, is not its script's
    for name, hosts in (("ce_weight", "task_loss_weight"), ("distill_weight", "distill_loss_weight")):
        if name in settings:
            if settings.get(hosts) is not None:
                raise ValueError(f"{name} and {hosts} are the same weight: give one of them")
            settings[hosts] = settings.pop(name)
    loss = {name: settings.pop(name) for name in _LOSS & set(settings) - _HOST}
    unknown = set(settings) - _HOST
    if unknown:
        raise TypeError(f"DiSKTask got unknown settings {sorted(unknown)}; known are {sorted(_LOSS | _HOST)}")
    return settings, loss


def check_modes(
    mode: str,
    epochs: int | None,
    dual: Mapping[str, Any] | None,
    alternating: Mapping[str, Any] | None,
    input_size: Sequence[int] | None,
    loss: Mapping[str, Any],
) -> None:
    """Validate that the arguments go together.

    Raises:
        ValueError: an unknown mode, or settings of a part that is absent.
    """
    if mode not in ("joint", "alternating"):
        raise ValueError(f"mode must be one of ['joint', 'alternating'], got {mode!r}")
    if alternating and mode == "joint":
        raise ValueError(f"alternating={dict(alternating)} needs mode='alternating', got 'joint'")
    if epochs is not None:
        _checks.integer("epochs", epochs, at_least=1)
    if epochs is not None and "multiplier" in loss:
        raise ValueError(
            f"with epochs={epochs} the multiplier is the schedule's: give dual={{'multiplier': (smallest, largest)}} "
            f"instead of multiplier={loss['multiplier']}"
        )
    if input_size is not None and len(input_size) != 3:
        raise ValueError(f"input_size must be (channels, height, width), got {tuple(input_size)}")
    if dual and epochs is None:
        raise ValueError(f"dual={dict(dual)} needs epochs, the length of the schedules, got None")


def check_criterion(criterion: nn.Module | None) -> None:
    """Validate that the criterion is one for a single distribution over classes.

    Raises:
        ValueError: a criterion with a sigmoid per class, or over several views of an image.
    """
    if isinstance(criterion, BinaryCrossEntropy | nn.BCEWithLogitsLoss | nn.BCELoss):
        raise ValueError(
            f"criterion must be a cross-entropy over classes, got {type(criterion).__name__} (--bce-loss): "
            f"{INCOMPATIBLE['bce_loss']}"
        )
    if isinstance(criterion, JsdCrossEntropy):
        raise ValueError(
            f"criterion must be a cross-entropy over classes, got {type(criterion).__name__} (--jsd-loss): "
            f"{INCOMPATIBLE['jsd_loss']}"
        )


def check_student(student: nn.Module, teacher: str | nn.Module) -> None:
    """Validate that the student is a timm model with one prediction, and not the teacher.

    Raises:
        ValueError: not a timm model; a distillation head set to predict separately, while inference uses the mean;
            parameters that the teacher shares.
    """
    student = unwrap_model(student)
    if isinstance(teacher, nn.Module):
        check_apart(student, teacher)
    missing = [name for name in ("num_classes", "in_chans", "pretrained_cfg") if not hasattr(student, name)]
    if missing:
        raise ValueError(f"the student must be a timm model, got {type(student).__name__} without {missing}")
    if getattr(student, "distilled_training", False):
        raise ValueError(
            f"the student must return one prediction, got {type(student).__name__} after set_distilled_training(True): "
            f"DiSK trains the mean of both heads, as inference uses it; call set_distilled_training(False)"
        )


def method_class(
    method: str | type[Method] | Method | None, known: Mapping[str, type[Method]]
) -> type[Method] | Method | None:
    """Return a method by its name, any other value unchanged.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a method.
    """
    if isinstance(method, str):
        if method not in known:
            raise ValueError(f"method must be one of {sorted(known)}, a Method class or a Method, got {method!r}")
        return known[method]
    if method is None or isinstance(method, Method) or (isinstance(method, type) and issubclass(method, Method)):
        return method
    raise TypeError(f"method must be a name, a Method class or a Method, got {type(method).__name__} {method!r}")


def method_settings(kind: type[Method] | Method, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a method's keywords; its own cross-entropy has weight 0, as the criterion is the host's.

    Raises:
        ValueError: settings of a method that is built already.
    """
    if isinstance(kind, Method):
        if settings:
            raise ValueError(f"method_settings={dict(settings)} are for a name or a class, got a built method")
        return {}
    has_ce = "ce_weight" in inspect.signature(kind).parameters
    return {**({"ce_weight": 0.0} if has_ce else {}), **(settings or {})}
