"""Turn any classifier into x -> (logits, features), by a forward pre-hook on its last Linear layer."""

import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SHOWN = 5  # layers named in an error
_RELATIVE_TOLERANCE = 1e-2  # a wrong layer differs by the size of the logits, half precision by less


class FeatureTap(nn.Module):
    """A classifier that also returns the input of its last Linear; made by ``with_features``.

    Attributes:
        feature_dim: D, the width of the features.
        layer: dotted name of the tapped layer inside ``model``.
    """

    def __init__(self, model: nn.Module, layer: str, feature_dim: int, *, check_output: bool) -> None:
        super().__init__()
        self.model, self.layer, self.feature_dim = model, layer, feature_dim
        self._check_output, self._checked = check_output, False
        self._watch_mode = not model.training
        tapped = model.get_submodule(layer)
        tapped._disk_seen = None  # type: ignore[assignment]
        tapped.register_forward_pre_hook(_keep_input, with_kwargs=True)
        tapped.register_forward_hook(_keep_output)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Call the model; return its logits and the tapped layer's input."""
        # Looked up per call and stored on the layer itself, as DataParallel replicas and copies have their own. Stored
        # during this call only, so that no graph is kept alive and a direct call of the model stores nothing.
        if self._watch_mode and self.model.training and not torch.is_grad_enabled():
            self._warn_of_mode()
        tapped = self.model.get_submodule(self.layer)
        seen: dict[str, Any] = {}
        tapped._disk_seen = seen  # type: ignore[assignment]
        try:
            logits = logits_of(self.model(*args, **kwargs))
        finally:
            tapped._disk_seen = None  # type: ignore[assignment]
        features = seen.get("input")
        if not isinstance(features, Tensor):
            raise RuntimeError(
                f"layer {self.layer!r} was not called with a Tensor in the model's forward pass: pass another "
                f"layer=NAME, or wrap a compiled model before its first call; {candidates(self.model, but=self.layer)}"
            )
        if not self._checked:
            self._checked = self._check(logits, features, seen.get("output"))
        if logits.ndim == 2 and features.ndim > 2 and features.shape[2:].numel() == 1:
            features = features.flatten(1)  # a 1x1 convolution in place of a Linear
        return logits, features

    def head(self, features: Tensor) -> Tensor:
        """Apply the tapped layer alone: features (N, D) to logits (N, C)."""
        layer: Any = self.model.get_submodule(self.layer)
        if features.ndim == 2 and hasattr(layer, "kernel_size"):  # a 1x1 convolution in place of a Linear
            logits: Tensor = layer(features.reshape(*features.shape, *[1] * len(layer.kernel_size))).flatten(1)
        else:
            logits = layer(features)
        return logits

    def _warn_of_mode(self) -> None:
        self._watch_mode = False
        warnings.warn(
            "the model was in evaluation mode when it was wrapped and is in training mode now, where dropout and "
            "BatchNorm make other outputs: train() of a module that holds it reaches it too; call eval() on this "
            "teacher after that",
            stacklevel=4,
        )

    def _check(self, logits: Tensor, features: Tensor, output: Any) -> bool:
        """Validate, on the first informative batch, the features' shape and that an unnamed layer yields the logits."""
        if features.ndim < 2 or features.shape[0] != logits.shape[0] or self.feature_dim not in features.shape[1:]:
            raise RuntimeError(
                f"layer {self.layer!r} reads a tensor of shape {tuple(features.shape)}, expected "
                f"({logits.shape[0]}, {self.feature_dim}, ...) beside logits of shape {tuple(logits.shape)}"
            )
        size = logits.detach().float().norm()
        if not self._check_output or not size.isfinite() or size == 0:
            return not self._check_output  # an empty, all-zero or NaN batch is not informative: check the next one
        if not _same(output, logits):
            raise RuntimeError(
                f"the last Linear layer {self.layer!r} does not make the model's logits of shape "
                f"{tuple(logits.shape)}: pass layer=NAME; {candidates(self.model, but=self.layer)}"
            )
        return True


def with_features(model: nn.Module, layer: str | None = None) -> FeatureTap:
    """Return a module x -> (logits, features), where features are the input of the model's last Linear layer.

    The model's code does not change: the layer gets two forward hooks. The model's output may be a Tensor, a tuple or
    list whose first element is the logits, a dict with ``"logits"`` or ``"out"``, or an object with ``.logits``.

    On the first batch the last Linear's output is compared with the logits, and raises if it differs; a named layer
    only has to be called. Gradients and train/eval mode are the caller's. It warns once if a model wrapped in
    evaluation mode runs in training mode without gradients, as a teacher does after its parent's ``train()``.

    Args:
        model: any classifier.
        layer: dotted name of the layer whose input is the features; None for the last ``nn.Linear``.

    Shape:
        Returns logits (N, C) or (N, C, d1, ...) and features (N, D) or, if the layer reads them, (N, D, d1, ...).
        Features (N, D, 1, 1), before a 1x1 convolution, become (N, D) beside logits (N, C).

    Returns:
        A module with ``feature_dim`` (for ``GuideHead(num_classes, feature_dim)``), ``layer`` and ``model``.

    Raises:
        ValueError: the model has no Linear layer, or none of that name; the message names candidates.
        TypeError: ``model`` is not a module; the named layer has no input width; in ``forward``, an output of another
            kind.
        RuntimeError: in ``forward``, the layer is not called or does not make the logits; the message names candidates.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> teacher = with_features(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)).eval())
        >>> logits, features = teacher(torch.randn(2, 3, 4))
        >>> logits.shape, features.shape, teacher.feature_dim
        (torch.Size([2, 5]), torch.Size([2, 8]), 8)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    names = linear_names(model)
    if layer is None and not names:
        raise ValueError(
            f"model has no nn.Linear layer whose input could be the features: pass layer=NAME, the layer that makes "
            f"the logits, to with_features; {candidates(model)}"
        )
    name = names[-1] if layer is None else layer
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"layer must name a module of the model, got {name!r}; {candidates(model)}")
    tapped = modules[name]
    width = _input_width(tapped)
    if width is None:
        raise TypeError(f"layer {name!r} must have in_features or in_channels, got {type(tapped).__name__}")
    tap = FeatureTap(model, name, width, check_output=layer is None)
    tap.training = model.training  # not train(): that would change the submodules, whose modes are the caller's
    return tap


def logits_of(output: Any) -> Tensor:
    """Find the logits in a model's output: a Tensor, (logits, ...), {"logits": ...}, {"out": ...} or ``.logits``.

    Raises:
        TypeError: the output is of another kind; the message names it.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
        found = output.get("out") if found is None else found
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        kind = f"dict with keys {list(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise TypeError(
            f"the model must return logits as a Tensor, a tuple, a dict with 'logits' or 'out', or an object with "
            f".logits, got {kind}"
        )
    return found


def _keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen: Any = module._disk_seen
    if seen is not None:
        seen["input"] = args[0] if args else next(iter(kwargs.values()), None)


def _keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    seen: Any = module._disk_seen
    if seen is not None:
        seen["output"] = output


def linear_names(model: nn.Module) -> list[str]:
    """Return the dotted names of a model's Linear layers, in the order of ``named_modules``."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def candidates(model: nn.Module, *, but: str | None = None) -> str:
    """Return the last layers whose input could be the features, the last one first, as words for a message."""
    named = [(name, module) for name, module in model.named_modules() if name != but]
    shown = [f"{name!r} ({_described(module)})" for name, module in reversed(named) if _input_width(module) is not None]
    if not shown:
        return "candidates: none, as no module has in_features or in_channels"
    return f"candidates: {', '.join(shown[:_SHOWN])}{', ...' if len(shown) > _SHOWN else ''}"


def _described(module: Any) -> str:
    """Return type, input and output width, and the kernel's size: ``Conv2d(512, 100, 1x1)``."""
    sizes = [_input_width(module), getattr(module, "out_features", getattr(module, "out_channels", "?"))]
    kernel = getattr(module, "kernel_size", None)
    sizes += ["x".join(map(str, kernel))] if isinstance(kernel, tuple) else []
    return f"{type(module).__name__}({', '.join(map(str, sizes))})"


def _input_width(module: nn.Module) -> int | None:
    """Return ``in_features`` or ``in_channels``; None if the module has no such integer."""
    width = getattr(module, "in_features", getattr(module, "in_channels", None))
    return int(width) if isinstance(width, numbers.Integral) else None  # numpy's too


def _same(output: Any, logits: Tensor) -> bool:
    """Whether a layer's output equals the logits, up to half precision's rounding."""
    if not isinstance(output, Tensor) or output.numel() != logits.numel():
        return False
    difference = (output.detach().reshape(logits.shape).float() - logits.detach().float()).norm()
    return bool(difference <= _RELATIVE_TOLERANCE * logits.detach().float().norm())
