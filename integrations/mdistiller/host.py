"""The host's data, models and weights, redirected and validated without changing its files."""

import hashlib
import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mdistiller.models as host_models
from mdistiller.distillers import distiller_dict
from torch import nn
from torchvision.datasets import CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from yacs.config import CfgNode

from disk_plugin.training import GuidePasses

from . import loaders
from .alternating import build_guide_optimizer, build_recipe
from .checkpoints import fingerprint, load_weights, read_checkpoint, save_atomically, warm_start_weights
from .distillers import GuidedDistiller
from .method_distiller import MethodDistiller, notes_of
from .trainers import check_rates

_CIFAR = "cifar-100-python"
_FOLDERS = {"imagenet": "imagenet", "tiny_imagenet": "tiny-imagenet-200"}  # of images, with train/ and val/


def use_data(cfg: CfgNode, folder: str | None) -> None:
    """Let the host read the dataset from ``folder``; for CIFAR-100 without its check for the official files.

    Raises:
        FileNotFoundError: the folder does not hold the dataset.
        ValueError: the host reads this dataset in a way that cannot be redirected.
    """
    if folder is None:
        return
    root, kind = Path(folder).expanduser().resolve(), cfg.DATASET.TYPE
    module = _data_module(kind)
    settable = [name for name in ("get_data_folder", "data_folder") if hasattr(module, name)]
    if module is None or not settable:
        lacks = "no module for it" if module is None else "neither get_data_folder nor data_folder in its module"
        raise ValueError(
            f"--data-root cannot redirect DATASET.TYPE {kind!r}: mdistiller/dataset ({', '.join(loaders.modules())}) "
            f"has {lacks}; leave --data-root out and put the data where the host looks for it"
        )
    if kind == "cifar100":
        _need(kind, [root / _CIFAR / name for name in ("train", "test", "meta")])
        CIFAR100.train_list = [[name, None] for name, _ in CIFAR100.train_list]
        CIFAR100.test_list = [[name, None] for name, _ in CIFAR100.test_list]
        CIFAR100.meta = {**CIFAR100.meta, "md5": None}
    elif kind in _FOLDERS:
        root = root / _FOLDERS[kind] if (root / _FOLDERS[kind]).is_dir() else root
        _need(kind, [root / "train", root / "val"])
    else:
        _need(kind, [root])
    setattr(module, settable[0], str(root) if settable[0] == "data_folder" else lambda: str(root))


def fingerprint_data(cfg: CfgNode, folder: str | None) -> str:
    """Return a fingerprint of the data, labels included; it is part of an experiment's settings.

    CIFAR-100's two files are hashed whole, in less than a second. Of folders of images it has the names, which give the
    labels, and the sizes of two images in each.
    """
    whose = "the host's" if folder is None else ""
    if cfg.DATASET.TYPE == "cifar100":
        if folder is None:
            return whose  # the host accepts only the official data
        files = [Path(folder).expanduser().resolve() / _CIFAR / name for name in ("train", "test")]
        sizes = " and ".join(str(file.stat().st_size) for file in files)
        return f"files of {sizes} bytes, {_digest(file.read_bytes() for file in files)}"
    data = getattr(_data_module(cfg.DATASET.TYPE), "data_folder", None) if folder is None else folder
    if folder is not None and cfg.DATASET.TYPE in _FOLDERS:
        data = _data_module(cfg.DATASET.TYPE).data_folder
    roots = [Path(data, split) for split in ("train", "val")] if isinstance(data, str) else []
    if not roots or not all(root.is_dir() for root in roots):
        return whose if folder is None else f"files {_digest([_files(Path(folder).expanduser())])}"
    counts = " and ".join(str(len([path for path in root.iterdir() if path.name[0] != "."])) for root in roots)
    return ", ".join([*([whose] if whose else []), f"{counts} folders", _digest(map(_listing, roots))])


def _data_module(kind: str) -> Any:
    """Return the host's module that reads a dataset: that of its name, in whatever spelling; or None."""
    plain = kind.replace("_", "").lower()
    found = [name for name in loaders.modules() if name.replace("_", "").lower() == plain]
    return importlib.import_module(f"mdistiller.dataset.{found[0]}") if found else None


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _listing(root: Path) -> bytes:
    """Return the name of every image under ``root``, as the host's ImageFolder finds it, and two sizes per folder."""
    lines = []
    for folder, children, files in os.walk(root, followlinks=True):
        children.sort()
        images = sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS))
        sizes = [os.path.getsize(os.path.join(folder, name)) for name in images[:1] + images[-1:]]
        lines.append(repr((os.path.relpath(folder, root), images, sizes)))
    return "\n".join(lines).encode()


def _files(root: Path) -> bytes:
    """Return names and sizes of all files under ``root``."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path in files).encode()


def _need(kind: str, paths: list[Path]) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"--data-root must hold {kind}, found no {', '.join(missing)}")


def models(cfg: CfgNode) -> dict[str, Any]:
    """Return the host's dictionary of models for the dataset, as its script chooses it.

    Raises:
        ValueError: the host has none.
    """
    known = {name: value for name, value in vars(host_models).items() if name.endswith("_model_dict")}
    own = f"{cfg.DATASET.TYPE}_model_dict"
    wanted = own if own in known or cfg.DATASET.TYPE == "imagenet" else "cifar_model_dict"
    if wanted not in known:
        raise ValueError(
            f"DATASET.TYPE {cfg.DATASET.TYPE!r} needs {wanted} in the host's mdistiller/models, which has "
            f"{', '.join(sorted(known)) or 'no *_model_dict'}"
        )
    return known[wanted]


def build_model(cfg: CfgNode, name: str) -> nn.Module:
    """Build one of the host's models for the dataset, untrained.

    Raises:
        ValueError: the host's dictionary holds neither of the two kinds of entry.
    """
    entry = models(cfg)[name]
    if _pretrains(entry):
        return entry(pretrained=False)
    if not isinstance(entry, tuple | list) or not entry or not callable(entry[0]):
        raise ValueError(
            f"the host's dictionary of models must hold (constructor, path of weights) or a constructor that takes "
            f"pretrained, got {entry!r:.60} for {name}"
        )
    return entry[0](num_classes=loaders.load(cfg).num_classes)


def _pretrains(entry: Any) -> bool:
    """Whether a model's entry is a constructor that loads its own weights, as the host has for ImageNet."""
    return callable(entry)


def build_teacher(cfg: CfgNode) -> nn.Module:
    """Build the teacher with its weights, after ``use_teacher``."""
    entry = models(cfg)[cfg.DISTILLER.TEACHER]
    if _pretrains(entry):
        return entry(pretrained=True)
    teacher = build_model(cfg, cfg.DISTILLER.TEACHER)
    teacher.load_state_dict(read_checkpoint(entry[1], key="--teacher-checkpoint"))
    return teacher


def use_teacher(cfg: CfgNode, checkpoint: str | None, scratch: Path, *, trust: bool) -> str:
    """Validate the teacher's weights and write them in the host's format, to a file under ``scratch``.

    Returns:
        A fingerprint of the weights; it is part of an experiment's settings.

    Raises:
        FileNotFoundError: no checkpoint at the host's or the user's path.
        ValueError: it cannot be read, or is another architecture's.
    """
    if cfg.DISTILLER.TYPE == "NONE":
        return "none"
    name, known = cfg.DISTILLER.TEACHER, models(cfg)
    if _pretrains(known[name]):
        if checkpoint is None:
            return "the host's"  # downloaded by the host
        weights = read_checkpoint(checkpoint, key="--teacher-checkpoint", trust=trust)
        teacher = build_model(cfg, name)
        load_weights(teacher, weights, f"--teacher-checkpoint {checkpoint}", f"teacher {name}")
        untrained = known[name]

        def trained(pretrained: bool = False, **settings: Any) -> nn.Module:
            model = untrained(pretrained=False, **settings)
            if pretrained:
                model.load_state_dict(weights)
            return model

        known[name] = trained
        return fingerprint(weights)
    path = checkpoint or next(iter(known[name][1:]), None)
    if path is None:
        raise FileNotFoundError(f"the host has no weights of teacher {name}: pass --teacher-checkpoint FILE")
    if checkpoint is None and not Path(path).is_file():
        raise FileNotFoundError(
            f"the teacher's checkpoint is missing, expected at {os.path.normpath(path)} (the host's README says where "
            f"to download it): put it there or pass --teacher-checkpoint FILE"
        )
    weights = read_checkpoint(path, key="--teacher-checkpoint", trust=trust)
    load_weights(build_model(cfg, name), weights, f"--teacher-checkpoint {path}", f"teacher {name}")
    converted = str(scratch / "teacher")
    save_atomically({"model": weights}, converted)
    known[name] = (known[name][0], converted, *known[name][2:])
    return fingerprint(weights)


def check_warm_start(cfg: CfgNode) -> str:
    """Validate the weights of ``DISTILLER.WARM_START`` and return their fingerprint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or is another architecture's.
    """
    path = cfg.DISTILLER.WARM_START
    if not path:
        return ""
    weights = warm_start_weights(cfg)
    student = cfg.DISTILLER.STUDENT
    load_weights(build_model(cfg, student), weights, f"DISTILLER.WARM_START {path}", f"student {student}")
    return fingerprint(weights)


def validate(cfg: CfgNode) -> list[str]:
    """Validate by constructing the distiller as the host's script will, so that errors come before anything is written.

    Returns:
        Notes for the user.

    Raises:
        ValueError: a setting out of range, or a pair of models that the method cannot use.
    """
    kind = distiller_dict[cfg.DISTILLER.TYPE]
    if not (isinstance(kind, type) and issubclass(kind, GuidedDistiller | MethodDistiller)):
        return []
    distiller = kind(build_model(cfg, cfg.DISTILLER.STUDENT), build_teacher(cfg), cfg)
    if cfg.SOLVER.TRAINER == "disk":
        check_rates()
        GuidePasses(distiller.disk, build_recipe(cfg), build_guide_optimizer(cfg, distiller.disk))
    note = distiller.dual.note if isinstance(distiller, GuidedDistiller) else None
    return [*([] if note is None else [f"DISK.DUAL: {note}"]), *notes_of(distiller.method, cfg.DISTILLER.TYPE)]
