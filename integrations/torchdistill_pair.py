"""The method in torchdistill's YAML files: made as it stands, or for the pair of models that the host has."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from disk_plugin._modes import in_mode
from disk_plugin.features import METHODS, Method, Outputs, Pair
from disk_plugin.features.method import LAST_MAP
from disk_plugin.taps import TeacherTail, get_tail, logits_of
from disk_plugin.taps.classifier import last_classifier


class Paths(NamedTuple):
    """Where a model's I/O dict holds what a method reads."""

    model: str
    features: str | None
    maps: dict[str, str]

    def outputs(self, io_dict: Any, model: nn.Module | None = None) -> Outputs:
        """Read what a method reads; the head is the module of ``model`` whose input the features are."""
        features = None if self.features is None else self._read(io_dict, self.features, "input")
        maps = {name: self._read(io_dict, path, "output") for name, path in self.maps.items()}
        head = None if model is None or self.features is None else model.get_submodule(self.features)
        return Outputs(logits_of(io_dict["."]["output"]), features, maps, head)

    def _read(self, io_dict: Any, path: str, io: str) -> Any:
        if io not in io_dict.get(path, {}):
            raise ValueError(f"{self.model}: forward_hook: {io} must name {path!r}, got {sorted(set(io_dict) - {'.'})}")
        return io_dict[path][io]

    def probe(self, model: nn.Module, images: Tensor) -> Outputs:
        """Run a model on images and read the same, by hooks of our own."""
        seen: dict[str, dict[str, Any]] = {}

        def keep(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                seen[path] = {"input": args[0], "output": output}

            return hook

        paths = {*self.maps.values(), *([] if self.features is None else [self.features])}
        hooks = [model.get_submodule(path).register_forward_hook(keep(path)) for path in sorted(paths)]
        try:
            with in_mode(model, training=False), torch.no_grad():
                seen["."] = {"output": model(images)}
        finally:
            for each in hooks:
                each.remove()
        return self.outputs(seen, model)


def find_method(config: Mapping[str, Any]) -> tuple[type[Method], dict[str, Any], dict[str, Any]]:
    """Return the method's class, its keywords, and the settings of ``Guided`` beside it.

    Raises:
        ValueError: an unknown name; a method with a prediction of its own.
    """
    settings = dict(config)
    key, kwargs = settings.pop("key"), settings.pop("kwargs", None) or {}
    module, _, name = key.rpartition(".")
    found: Any = getattr(import_module(module), name) if module else METHODS.get(key)
    if found is None:
        raise ValueError(f"method must be one of {sorted(METHODS)} or a class as package.module.Class, got {key!r}")
    if getattr(found, "own_prediction", False):
        raise ValueError(
            f"{key} predicts by parameters beside the student's, which this host neither evaluates nor saves with the "
            f"student: use timm or mdistiller"
        )
    return found, kwargs, settings


def build_for_pair(
    kind: type[Method],
    models: tuple[nn.Module, nn.Module],
    paths: tuple[Paths, Paths],
    image_size: Sequence[int],
    device: torch.device,
    settings: Mapping[str, Any],
) -> Method:
    """Build a method for student and teacher, in this order, by ``for_pair`` on images of noise.

    Raises:
        ValueError: a pair that the method cannot use; a size that is not (C, H, W).
    """
    if len(image_size) != 3:
        raise ValueError(f"image_size must be [C, H, W] of the training images, got {list(image_size)}")
    images = torch.randn(2, *image_size, generator=torch.Generator().manual_seed(0)).to(device)
    shown = [each.probe(model, images) for each, model in zip(paths, models, strict=True)]
    teacher = models[1]

    def head() -> nn.Module:
        if LAST_MAP not in shown[1].maps:
            raise ValueError(f"teacher_maps must name {LAST_MAP!r}, which the teacher's classifier reads")
        return last_classifier(teacher, shown[1].maps[LAST_MAP], shown[1].logits)

    def tail(**options: Any) -> TeacherTail:
        return get_tail(teacher, images, **options)

    return kind.for_pair(Pair(shown[0], shown[1], head, tail), **settings)
