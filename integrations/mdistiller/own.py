"""Models and datasets of the user's own, from the modules of ``--import``: ``MODELS`` and ``DATASETS`` there.

A model is a constructor that takes ``num_classes`` and returns logits, or what the host's models return. A dataset is a
function of the configuration that returns what the host's ``get_dataset`` returns.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from yacs.config import CfgNode

from . import host, loaders

_KINDS = {"MODELS": "constructors that take num_classes", "DATASETS": "functions of the configuration"}


def collected(modules: Iterable[str], attribute: str) -> dict[str, Callable[..., Any]]:
    """Return the entries of a dictionary of that name in imported modules.

    Raises:
        ValueError: it is not a dictionary of functions by name, or two modules have the same name.
    """
    found: dict[str, Callable[..., Any]] = {}
    for module in modules:
        entries = getattr(sys.modules[module], attribute, {})
        if not isinstance(entries, dict) or not all(isinstance(k, str) and callable(v) for k, v in entries.items()):
            raise ValueError(f"--import {module}: {attribute} must be a dict of {_KINDS[attribute]} by name")
        twice = sorted(entries.keys() & found.keys())
        if twice:
            raise ValueError(f"--import {module}: {attribute} has {twice[0]!r} a second time, rename it")
        found |= entries
    return found


def add_models(cfg: CfgNode, own: dict[str, Callable[..., Any]]) -> None:
    """Add models to the host's dictionary for the dataset.

    Raises:
        ValueError: the host has a model of that name.
    """
    known = host.models(cfg)
    pretraining = any(callable(entry) for entry in known.values())
    for name, constructor in own.items():
        if name in known:
            raise ValueError(f"--import: MODELS has {name!r}, which the host has too: rename it")
        build = functools.partial(_built, constructor)
        known[name] = functools.partial(_pretrained, name, build, cfg) if pretraining else (build, None)


def add_datasets(cfg: CfgNode, own: dict[str, Callable[..., Any]], root: str | None) -> bool:
    """Let the host's ``get_dataset`` know datasets; return whether the chosen one is among them.

    Raises:
        ValueError: ``root`` is given to a dataset that takes none.
    """
    kind = cfg.DATASET.TYPE
    readers = dict(own)
    if kind in own and root is not None:
        if "root" not in inspect.signature(own[kind]).parameters:
            raise ValueError(
                f"--data-root needs a dataset that takes root, {kind!r} of --import takes the configuration"
            )
        readers[kind] = functools.partial(own[kind], root=root)
    loaders.share(readers)
    return kind in own


def _built(constructor: Callable[..., Any], num_classes: int) -> nn.Module:
    model = constructor(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise TypeError(f"--import: a constructor in MODELS must return a Module, got {type(model).__name__}")
    return showing_features(model)


def _pretrained(name: str, build: Callable[..., nn.Module], cfg: CfgNode, pretrained: bool = False) -> nn.Module:
    if pretrained:
        raise ValueError(f"there are no weights of teacher {name}: pass --teacher-checkpoint FILE")
    return build(num_classes=loaders.load(cfg).num_classes)


def showing_features(model: nn.Module) -> nn.Module:
    """Let a model that returns logits return the host's pair, with its last Linear's input as ``pooled_feat``.

    The class is replaced by a subclass, so that names in checkpoints and ``DataParallel``'s replicas stay as they are.
    """
    kind: Any = type(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen: dict[str, Tensor] = {}
        layer: Any = self.get_submodule(linear[-1]) if linear else None
        if layer is not None:
            layer._disk_shown = seen
        try:
            found = kind.forward(self, *args, **kwargs)
        finally:
            if layer is not None:
                layer._disk_shown = None
        if not isinstance(found, Tensor):
            return found
        return found, {"pooled_feat": seen["input"]} if seen.get("output") is found else {}

    if linear:
        model.get_submodule(linear[-1]).register_forward_hook(_keep)
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return model


def _keep(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    if getattr(layer, "_disk_shown", None) is not None and args:
        layer._disk_shown |= {"input": args[0], "output": output}
