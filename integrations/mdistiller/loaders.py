"""The host's data loaders, built once by its own ``get_dataset``; they say how many classes there are."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, RandomSampler, Subset
from yacs.config import CfgNode

GetDataset = Callable[[CfgNode], tuple[Any, Any, int, int]]


class Loaders(NamedTuple):
    """What the host's ``get_dataset`` returns."""

    train: Any
    val: Any
    num_data: int
    num_classes: int


_BUILT: list[Loaders] = []


def share(own: Mapping[str, GetDataset]) -> None:
    """Let the host's ``get_dataset`` build the loaders once, for launcher and script, and know datasets of one's own.

    Args:
        own: by ``DATASET.TYPE``, functions with the arguments and results of the host's.
    """
    module: Any = importlib.import_module("mdistiller.dataset")
    host: GetDataset = module.get_dataset

    def get_dataset(cfg: CfgNode) -> Loaders:
        if not _BUILT:
            kind = cfg.DATASET.TYPE
            found = _checked(own.get(kind, host)(cfg), kind)
            if kind in own:
                _check_samples(found, kind)
            _BUILT.append(_without_held_out(found, cfg))
        return _BUILT[0]

    module.get_dataset = get_dataset
    strong = getattr(module, "get_dataset_strong", None)  # of forks that train on two views of an image
    if strong is not None:
        module.get_dataset_strong = lambda cfg: _without_held_out(_checked(strong(cfg), cfg.DATASET.TYPE), cfg)


def load(cfg: CfgNode) -> Loaders:
    """Return the loaders.

    Raises:
        ValueError: the host does not know the dataset, or cannot read it.
    """
    module, kind = importlib.import_module("mdistiller.dataset"), cfg.DATASET.TYPE
    try:
        return _checked(module.get_dataset(cfg), kind)
    except NotImplementedError as error:
        raise ValueError(
            f"DATASET.TYPE must be one that the host's get_dataset knows, got {kind!r}; mdistiller/dataset holds "
            f"{', '.join(modules())}"
        ) from error
    except ValueError:
        raise
    except Exception as error:  # whatever the host's reading raises
        said = str(error).splitlines()
        raise ValueError(
            f"the host's get_dataset fails for DATASET.TYPE {kind}: {type(error).__name__}: {said[0] if said else ''}"
        ) from error


def modules() -> list[str]:
    """Return the names of the modules in the host's ``mdistiller/dataset``."""
    package = importlib.import_module("mdistiller.dataset")
    return sorted(found.name for found in pkgutil.iter_modules(package.__path__))


def described(cfg: CfgNode) -> str:
    """Return what stands for the contents of a dataset of the user's own: part of an experiment's settings."""
    found = load(cfg)
    return f"{cfg.DATASET.TYPE} of {found.num_data} images, {found.num_classes} classes"


def held_out(count: int, share: float) -> list[int]:
    """Return the indices of the images that are held out: the same in every run, whatever its seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: max(1, round(share * count))].tolist()


def image_shape(cfg: CfgNode) -> tuple[int, ...]:
    """Return the shape of a transformed test image."""
    shape = getattr(load(cfg).val.dataset[0][0], "shape", ())
    return tuple(shape) if len(shape) == 3 else (3, 32, 32)


def _without_held_out(found: Loaders, cfg: CfgNode) -> Loaders:
    """Return the loaders without the share ``DATASET.HELD_OUT`` of the training images."""
    share, loader = cfg.DATASET.HELD_OUT, found.train
    if not share:
        return found
    if not 0 < share < 1:
        raise ValueError(f"DATASET.HELD_OUT must be a share of the training images in [0, 1), got {share}")
    left = sorted(set(range(len(loader.dataset))) - set(held_out(len(loader.dataset), share)))
    same = (
        "batch_size",
        "num_workers",
        "pin_memory",
        "drop_last",
        "collate_fn",
        "worker_init_fn",
        "persistent_workers",
    )
    settings = {name: getattr(loader, name) for name in same}
    train = DataLoader(Subset(loader.dataset, left), shuffle=isinstance(loader.sampler, RandomSampler), **settings)
    return found._replace(train=train)


def _check_samples(found: Loaders, kind: str) -> None:
    sample = found.train.dataset[0]
    if not isinstance(sample, tuple | list) or len(sample) != 3:
        shown = f"{len(sample)} values" if isinstance(sample, tuple | list) else type(sample).__name__
        raise ValueError(f"a training sample of DATASET.TYPE {kind} must be (image, target, index), got {shown}")


def _checked(found: Any, kind: str) -> Loaders:
    if not isinstance(found, tuple) or len(found) != 4 or not isinstance(found[3], int):
        shown = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(
            f"get_dataset must return (train_loader, val_loader, num_data, num_classes), got {shown} for DATASET.TYPE "
            f"{kind}"
        )
    return Loaders(*found)
