"""Turn any classifier into x -> (logits, feature maps by name), by hooks or by timm's own methods."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .hooks import logits_of
from .intermediate import Intermediate
from .timm_models import Layout

_SHOWN = 8  # modules named in an error


class MapTap(nn.Module):
    """A classifier that also returns feature maps; made by ``with_maps``.

    Attributes:
        model: the classifier.
        paths: dotted name of the module whose output is a map, by the map's name; empty for timm's own methods.
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, str]) -> None:
        super().__init__()
        self.model, self.paths = model, dict(paths)
        self._intermediate: Intermediate | None = None
        for path in set(self.paths.values()):
            tapped = model.get_submodule(path)
            tapped._disk_maps = None  # type: ignore[assignment]
            tapped.register_forward_hook(_keep)

    def forward(self, x: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the model; return its logits and its maps."""
        return self._by_hooks(x) if self.paths else self._by_methods(x)

    def _by_hooks(self, x: Any) -> tuple[Tensor, dict[str, Tensor]]:
        # stored on the modules, as replicas and copies have their own, and during this call only
        seen: dict[str, Any] = {}
        tapped: dict[str, Any] = {path: self.model.get_submodule(path) for path in self.paths.values()}
        for path, module in tapped.items():
            module._disk_maps = seen, path
        try:
            logits = logits_of(self.model(x))
        finally:
            for module in tapped.values():
                module._disk_maps = None
        missing = sorted(set(tapped) - set(seen))
        if missing:
            raise RuntimeError(f"the modules {missing} were not called in the model's forward pass: name others")
        sides = tuple(x.shape[2:]) if isinstance(x, Tensor) and x.ndim == 4 else None
        return logits, {name: _to_map(name, path, seen[path], sides) for name, path in self.paths.items()}

    def _by_methods(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = self.model
        if self._intermediate is None:
            self._intermediate = Intermediate.of(model, x[:2])
        features, before = self._intermediate(model, x)
        last = Layout.of(model, features, tuple(x.shape[2:])).to_map(features)
        return logits_of(model.forward_head(features)), {"before_last": before, "last": last}


def with_maps(model: nn.Module, paths: Mapping[str, str] | None = None) -> MapTap:
    """Return a module x -> (logits, maps by name).

    Args:
        model: any classifier; its output may be all that ``logits_of`` accepts.
        paths: dotted name of the module whose output is a map, by the map's name, such as
            ``{"before_last": "layer3", "last": "layer4"}``; None for a timm model, which shows these two itself.

    Shape:
        Returns logits (N, C) and maps (N, D, H, W). Outputs (N, L, D) of a named module are taken as the tokens of a
        square image, without class tokens; those (N, H, W, D), as of torchvision's Swin, are told by the images' aspect
        ratio; a tuple's first element counts.

    Raises:
        ValueError: no module of that name, the message names some; no paths for a model without timm's methods, or for
            a compiled one, whose methods are not; in ``forward``, an output that is no map.
        TypeError: ``model`` is not a module.
        RuntimeError: in ``forward``, a named module is not called.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 8, 2, stride=2), nn.Flatten())
        >>> logits, maps = with_maps(model, {"before_last": "0", "last": "1"})(torch.randn(2, 3, 8, 8))
        >>> {name: tuple(each.shape) for name, each in maps.items()}
        {'before_last': (2, 4, 4, 4), 'last': (2, 8, 2, 2)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    if not paths and hasattr(model, "_orig_mod"):
        raise ValueError(
            "expected a model that is not compiled, got the result of torch.compile, whose forward_intermediates runs "
            "uncompiled: call torch.compile(with_maps(model)) instead"
        )
    if not paths and not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"paths must name the modules whose outputs are the maps, such as {{'before_last': 'layer3', 'last': "
            f"'layer4'}}: {type(model).__name__} has no forward_intermediates, by which timm's models show them"
        )
    known = [name for name, _ in model.named_modules() if name]
    for name, path in (paths or {}).items():
        if path not in known:
            shown = ", ".join(known[-_SHOWN:])
            raise ValueError(f"paths[{name!r}] must name a module of the model, got {path!r}; its last ones: {shown}")
    tap = MapTap(model, paths or {})
    tap.training = model.training  # not train(): that would change the submodules, whose modes are the caller's
    return tap


def _shows(size: tuple[int, ...], sides: tuple[int, ...]) -> bool:
    """Whether a map of this size may be of images with these sides, which strides divide and round."""
    return abs(size[0] * sides[1] - size[1] * sides[0]) <= max(sides) and size[0] <= sides[0]


def _keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    keeper: Any = module._disk_maps
    if keeper is not None:
        seen, path = keeper
        seen[path] = output[0] if isinstance(output, tuple | list) else output


def _to_map(name: str, path: str, output: Any, sides: tuple[int, ...] | None) -> Tensor:
    if isinstance(output, Tensor) and output.ndim == 4:
        last = sides is not None and _shows(output.shape[1:3], sides) and not _shows(output.shape[2:], sides)
        return output.permute(0, 3, 1, 2) if last else output
    if isinstance(output, Tensor) and output.ndim == 3 and math.isqrt(output.shape[1]) ** 2 == output.shape[1]:
        return Layout("NLC", 0).to_map(output)
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(f"the map {name!r}, the output of {path!r}, must have shape (N, C, H, W), got {found}")
