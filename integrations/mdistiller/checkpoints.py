"""Checkpoints: read, validate against the model, write atomically."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from disk_plugin.features import METHODS, Method

from .feature_maps import outputs_of, shown

Weights = dict[str, Tensor]

_UNTRAINED_HEAD = "untrained_head"  # marks files of a student whose own classifier was not trained by its method


def write(content: Any, path: str) -> None:
    """Write a checkpoint and fsync it."""
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def save_atomically(content: Any, path: str) -> None:
    """Replace ``path`` atomically by the new checkpoint; an interrupted write leaves the old one."""
    partial = f"{path}.partial"
    write(content, partial)
    os.replace(partial, path)


def load_tensors(path: str) -> Any:
    """Load as the host does with torch 2.6 or newer, whose default is ``weights_only``."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load_file(path: str, *, key: str, trust: bool = False) -> Any:
    """Load a checkpoint; ``key`` is the flag or configuration key that named it.

    Safe for files of others from torch 2.6 on: before, they can get round ``weights_only`` (CVE-2025-32434).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, or one that ``weights_only`` loading rejects, without ``trust``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key} must name a checkpoint file, found none at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # a file that is not a checkpoint may raise nearly anything
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise ValueError(
                f"{key} must hold tensors and numbers only, got other objects in {path}: if you trust where it comes "
                f"from, --trust-checkpoint loads the teacher's whatever it holds (that can run code)"
            ) from error
        raise ValueError(f"{key} must be a checkpoint written by torch.save, got {path} ({reason})") from error


def read_checkpoint(path: str, *, key: str, trust: bool = False) -> Weights:
    """Return a network's weights: of ``{"model": ...}`` (the host's), ``{"state_dict": ...}`` or a bare state dict.

    Of a checkpoint of a whole run without a teacher, they are the student's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, or not one of a single network that can classify.
    """
    weights = _read(path, key=key, trust=trust, head=True)
    if all(any(name.startswith(role) for name in weights) for role in ("teacher.", "student.")):
        raise ValueError(
            f"{key} must hold the weights of one network, got a whole run with its teacher and its student in {path}: "
            f"the student alone is in student_best and student_latest beside it"
        )
    return _get_student(weights)


def read_student(path: str, *, key: str, head: bool = True) -> Weights:
    """Return a student's weights, also of a whole run; ``head``: whether its classifier will be used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, one without weights, or, with ``head``, of a student that cannot predict alone.
    """
    return _get_student(_read(path, key=key, trust=False, head=head))


def warm_start_weights(cfg: CfgNode) -> Weights:
    """Return the weights of ``DISTILLER.WARM_START``; the student's classifier has to be trained only if it is used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see ``read_student``.
    """
    head = not any(cfg.DISTILLER.TYPE in (name.upper(), f"DISK_{name.upper()}") for name in _predicting())
    return read_student(cfg.DISTILLER.WARM_START, key="DISTILLER.WARM_START", head=head)


def _read(path: str, *, key: str, trust: bool, head: bool) -> Weights:
    content = load_file(path, key=key, trust=trust)
    marked = isinstance(content, dict) and bool(content.get(_UNTRAINED_HEAD))
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if isinstance(content, dict):  # a whole run of DiSK holds its schedule's state among the weights
        content = {name: value for name, value in content.items() if not str(name).endswith("_extra_state")}
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        kind = f"a dict with {sorted(map(str, content))[:5]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{key} must hold {{"model": state dict}} or a bare state dict, got {kind} in {path}')
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    names = _predicting()
    found = [name for name in names if _belongs_to(name, content, Path(path))] or (list(names) if marked else [])
    if head and found:
        files = " or ".join(f"{name}_best and {name}_latest" for name in found)
        owners = " or ".join(names[name].__name__ for name in found)
        sections = " and ".join(f"{name.upper()} and DISK_{name.upper()}" for name in found)
        raise ValueError(
            f"{key} needs a network with a trained classifier, got a student trained by {owners} in {path}: it "
            f"predicts through the method's own layers, which are in {files} (for --evaluate), and its own was never "
            f"trained (DISTILLER.WARM_START of {sections} takes it all the same)"
        )
    return content


def _predicting() -> dict[str, type[Method]]:
    """Return the methods that predict, instead of the student's own classifier."""
    return {name: kind for name, kind in METHODS.items() if kind.own_prediction}


def _belongs_to(name: str, weights: Weights, path: Path) -> bool:
    """Whether the weights are of a method's whole run or files, or an unmarked student file beside these."""
    older = path.name.startswith("student_") and path.with_name(f"{name}_latest").exists()
    return older or any(key.startswith(f"{name}.") for key in weights)


def _get_student(weights: Weights) -> Weights:
    """Return the student's part of a distiller's weights; a single network's weights are returned unchanged."""
    inner = {name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")}
    return inner or weights


def fingerprint(weights: Weights) -> str:
    """Return a short hash of names, shapes and values, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{weights[name].dtype}{tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(model: nn.Module, weights: Weights, what: str, role: str) -> None:
    """Load weights into a model; all names and shapes must agree.

    Raises:
        ValueError: the weights are of another architecture; the message says where they differ.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    differences = [
        f"{label} {len(names)} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in (("lacks", missing), ("has unknown", unknown), ("has of another shape", shapes))
        if names
    ]
    if differences:
        raise ValueError(
            f"{what} is not of the {role}'s architecture: of {len(own)} tensors it {'; '.join(differences)}"
        )
    model.load_state_dict(weights)


class DeployedStudent(nn.Module):
    """A student with its method, for methods that predict: all that inference needs."""

    def __init__(self, student: nn.Module, name: str, method: Method) -> None:
        super().__init__()
        self.student, self._name = student, name
        self.add_module(name, method)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (N, C) and the student's features, as the host's models do."""
        method: Any = getattr(self, self._name)
        logits, features = outputs_of(self.student, image)
        return method.predict(shown(logits, features, method.reads_of("student"))), features


def marked_untrained(student_state: dict[str, Any]) -> dict[str, Any]:
    """Return the host's checkpoint of a student with a mark that its classifier is untrained."""
    return {**student_state, _UNTRAINED_HEAD: True}


def deployed_state(distiller: Any) -> dict[str, Any]:
    """Return a checkpoint that can be evaluated without the teacher: see ``deployed_student``."""
    model = DeployedStudent(distiller.student, distiller.method_name, distiller.method)
    return {"model": model.state_dict(), **distiller.method.about()}


def deployed_method(content: Any) -> str | None:
    """Return the method whose ``deployed_state`` a checkpoint is, or None."""
    weights = content.get("model") if isinstance(content, dict) else None
    parts = {str(key).split(".")[0] for key in weights} if isinstance(weights, dict) else set()
    return next((name for name in _predicting() if parts == {"student", name}), None)


def deployed_student(student: nn.Module, name: str, content: dict[str, Any]) -> DeployedStudent:
    """Rebuild the module of a ``deployed_state`` checkpoint around a fresh student."""
    weights, prefix = content["model"], f"{name}."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    about = {key: value for key, value in content.items() if key != "model"}
    model = DeployedStudent(student, name, METHODS[name].from_state(own, about))
    load_weights(model, weights, "the checkpoint", "student")
    return model
