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
from torchvision.datasets.folder import IMG_EXTENSIONS
from yacs.config import CfgNode

from disk_plugin.training import GuidePasses

from .checkpoints import fingerprint, load_weights, read_checkpoint, save_atomically, warm_start_weights
from .config import build_guide_optimizer, build_recipe
from .distillers import GuidedDistiller
from .method_distiller import MethodDistiller

_CIFAR = "cifar-100-python"
_CLASSES = {"cifar100": 100, "tiny_imagenet": 200, "imagenet": 1000}


def use_data(cfg: CfgNode, folder: str | None) -> None:
    """Let the host read the dataset from ``folder``; for CIFAR-100 without its check for the official files.

    Raises:
        FileNotFoundError: the folder does not hold the dataset.
    """
    if folder is None:
        return
    root, kind = Path(folder).expanduser().resolve(), cfg.DATASET.TYPE
    module = _data_module(cfg)
    if kind == "cifar100":
        _need("cifar100", [root / _CIFAR / name for name in ("train", "test", "meta")])
        module.get_data_folder = lambda: str(root)
        dataset = module.datasets.CIFAR100
        dataset.train_list = [[name, None] for name, _ in dataset.train_list]
        dataset.test_list = [[name, None] for name, _ in dataset.test_list]
        dataset.meta = {**dataset.meta, "md5": None}
        return
    name = {"imagenet": "imagenet", "tiny_imagenet": "tiny-imagenet-200"}[kind]
    root = root / name if (root / name).is_dir() else root
    _need(kind, [root / "train", root / "val"])
    module.data_folder = str(root)


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
    roots = [Path(_data_module(cfg).data_folder, split) for split in ("train", "val")]
    if not all(root.is_dir() for root in roots):
        return whose  # the host raises for it
    counts = " and ".join(str(len([path for path in root.iterdir() if path.name[0] != "."])) for root in roots)
    return ", ".join([*([whose] if whose else []), f"{counts} folders", _digest(map(_listing, roots))])


def _data_module(cfg: CfgNode) -> Any:
    return importlib.import_module(f"mdistiller.dataset.{cfg.DATASET.TYPE}")


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


def _need(kind: str, paths: list[Path]) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"--data-root must hold {kind}, found no {', '.join(missing)}")


def models(cfg: CfgNode) -> dict[str, Any]:
    """Return the host's dictionary of models for the dataset.

    Raises:
        ValueError: an unknown dataset.
    """
    known = {
        "cifar100": host_models.cifar_model_dict,
        "tiny_imagenet": host_models.tiny_imagenet_model_dict,
        "imagenet": host_models.imagenet_model_dict,
    }
    if cfg.DATASET.TYPE not in known:
        raise ValueError(f"DATASET.TYPE must be one of {', '.join(known)}, got {cfg.DATASET.TYPE!r}")
    return known[cfg.DATASET.TYPE]


def build_model(cfg: CfgNode, name: str) -> nn.Module:
    """Build one of the host's models for the dataset, untrained."""
    entry = models(cfg)[name]
    if cfg.DATASET.TYPE == "imagenet":
        return entry(pretrained=False)
    return entry[0](num_classes=_CLASSES[cfg.DATASET.TYPE])


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
    if cfg.DATASET.TYPE == "imagenet":
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
    path = checkpoint or known[name][1]
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
    known[name] = (known[name][0], converted)
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
    if cfg.DATASET.TYPE == "imagenet":
        teacher = models(cfg)[cfg.DISTILLER.TEACHER](pretrained=True)
    else:
        teacher = build_model(cfg, cfg.DISTILLER.TEACHER)
        weights = read_checkpoint(models(cfg)[cfg.DISTILLER.TEACHER][1], key="--teacher-checkpoint")
        teacher.load_state_dict(weights)
    distiller = kind(build_model(cfg, cfg.DISTILLER.STUDENT), teacher, cfg)
    if cfg.SOLVER.TRAINER == "disk":
        GuidePasses(distiller.disk, build_recipe(cfg), build_guide_optimizer(cfg, distiller.disk))
    note = distiller.dual.note if isinstance(distiller, GuidedDistiller) else None
    return [] if note is None else [f"DISK.DUAL: {note}"]
