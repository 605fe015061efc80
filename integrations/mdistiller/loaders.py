"""The host's data loaders, built once by its own ``get_dataset``; they say how many classes there are."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
            _BUILT.append(_checked(own.get(cfg.DATASET.TYPE, host)(cfg), cfg.DATASET.TYPE))
        return _BUILT[0]

    module.get_dataset = get_dataset


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


def _checked(found: Any, kind: str) -> Loaders:
    if not isinstance(found, tuple) or len(found) != 4 or not isinstance(found[3], int):
        shown = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(
            f"get_dataset must return (train_loader, val_loader, num_data, num_classes), got {shown} for DATASET.TYPE "
            f"{kind}"
        )
    return Loaders(*found)
