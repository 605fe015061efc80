"""Checkpoints: read what others wrote, check it against the model, write so that nothing is ever half-written."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from disk_plugin.features.simkd import SimKD, pooled_classifier

from .feature_maps import student_map

Weights = dict[str, Tensor]

_UNTRAINED_HEAD = "untrained_head"  # in files of a student whose own classifier SimKD leaves as it was


def write(content: Any, path: str) -> None:
    """Write a checkpoint and wait until it is on the disk."""
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def save_atomically(content: Any, path: str) -> None:
    """Replace ``path`` by the new checkpoint once that is on the disk; an interrupted write leaves the old one."""
    partial = f"{path}.partial"
    write(content, partial)
    os.replace(partial, path)


def load_file(path: str, *, key: str, trust: bool = False) -> Any:
    """Load a checkpoint; ``key`` is the flag or configuration key that named it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, or one that holds more than tensors and numbers and is not trusted.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key} must name a checkpoint file, found none at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # a file that is no checkpoint makes torch raise nearly anything
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise ValueError(
                f"{key} must hold tensors and numbers only, got other objects in {path}: if you trust where it comes "
                f"from, --trust-checkpoint loads the teacher's whatever it holds (that can run code)"
            ) from error
        raise ValueError(f"{key} must be a checkpoint written by torch.save, got {path} ({reason})") from error


def read_checkpoint(path: str, *, key: str, trust: bool = False) -> Weights:
    """Return a network's weights: the host's ``{"model": ...}``, ``{"state_dict": ...}`` or a bare state dict.

    Of a whole run without a teacher these are its student's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, or none with the weights of one network that can classify.
    """
    weights = _read(path, key=key, trust=trust, head=True)
    if all(any(name.startswith(role) for name in weights) for role in ("teacher.", "student.")):
        raise ValueError(
            f"{key} must hold the weights of one network, got a whole run with its teacher and its student in {path}: "
            f"the student alone is in student_best and student_latest beside it"
        )
    return _student_of(weights)


def read_student(path: str, *, key: str, head: bool = True) -> Weights:
    """Return a student's weights, also out of a whole run; ``head`` tells whether its classifier will be used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, none with weights, or one of SimKD's student if ``head``.
    """
    return _student_of(_read(path, key=key, trust=False, head=head))


def warm_start_weights(cfg: CfgNode) -> Weights:
    """Return the weights that ``DISTILLER.WARM_START`` names; SimKD may go on from its own, as it reads no classifier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see :func:`read_student`.
    """
    head = "SIMKD" not in cfg.DISTILLER.TYPE
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
    if head and (marked or _of_simkd(content, Path(path))):
        raise ValueError(
            f"{key} needs a network with a trained classifier, got a student trained by SimKD in {path}: it predicts "
            f"through projector and teacher's classifier, which are in simkd_best and simkd_latest (for --evaluate), "
            f"and its own was never trained (DISTILLER.WARM_START of SIMKD and DISK_SIMKD takes it all the same)"
        )
    return content


def _of_simkd(weights: Weights, path: Path) -> bool:
    """Tell SimKD's whole runs, its ``simkd_*`` files and, in their folder, student files without the mark."""
    older = path.name.startswith("student_") and path.with_name("simkd_latest").exists()
    return older or any(name.startswith("simkd.") for name in weights)


def _student_of(weights: Weights) -> Weights:
    """Take the student out of a whole distiller's weights; a network's own pass as they are."""
    inner = {name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")}
    return inner or weights


def fingerprint(weights: Weights) -> str:
    """Return a short hash of names, shapes and values, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{weights[name].dtype}{tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(model: nn.Module, weights: Weights, what: str, role: str) -> None:
    """Load strictly.

    Raises:
        ValueError: the weights are another architecture's; the message says where they differ.
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


class SimKDStudent(nn.Module):
    """What inference needs of SimKD: the student, its projector and the teacher's classifier."""

    def __init__(self, student: nn.Module, simkd: SimKD) -> None:
        super().__init__()
        self.student, self.simkd = student, simkd

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (N, C) and the student's features, as the host's models do."""
        _, features = self.student(image)
        return self.simkd.predict(student_map(features)), features


def marked_untrained(student_state: dict[str, Any]) -> dict[str, Any]:
    """Return the host's checkpoint of a student with the mark that its classifier is untrained."""
    return {**student_state, _UNTRAINED_HEAD: True}


def simkd_state(distiller: Any) -> dict[str, Any]:
    """Return a checkpoint that can be evaluated without the teacher: see :func:`simkd_student`."""
    return {
        "model": SimKDStudent(distiller.student, distiller.simkd).state_dict(),
        "teacher_size": list(distiller.simkd.teacher_size),
    }


def simkd_student(student: nn.Module, content: dict[str, Any]) -> SimKDStudent:
    """Rebuild from the checkpoint of :func:`simkd_state` what it holds, around a fresh student."""
    weights = content["model"]
    first, last = weights["simkd.projector.0.weight"], weights["simkd.projector.6.weight"]
    linear = next(name for name in weights if name.startswith("simkd.classifier.") and name.endswith(".weight"))
    classes, width = weights[linear].shape
    classifier = pooled_classifier(nn.Linear(width, classes, bias=linear.removesuffix("weight") + "bias" in weights))
    simkd = SimKD(
        first.shape[1],
        last.shape[0],
        classifier,
        teacher_size=tuple(content["teacher_size"]),
        factor=last.shape[0] // first.shape[0],
    )
    model = SimKDStudent(student, simkd)
    load_weights(model, weights, "the checkpoint", "student")
    return model
