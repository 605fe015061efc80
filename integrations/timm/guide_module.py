"""A task's guide: keywords of ``GuideHead``, or the user's own module, tried on the teacher's outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disk_plugin import GuideHead
from disk_plugin._modes import in_mode
from disk_plugin.guide import reads_features as module_reads_features


def reads_features(guide: Mapping[str, Any] | nn.Module) -> bool:
    """Return whether the guide reads the teacher's pre-logits beside its logits.

    Raises:
        TypeError: neither keywords nor a module.
    """
    if isinstance(guide, Mapping):
        return bool(guide.get("use_features", True))
    if not isinstance(guide, nn.Module):
        raise TypeError(f"guide must be keywords of GuideHead or a Module, got {type(guide).__name__} {guide!r}")
    return module_reads_features(guide)


def build_guide(guide: Mapping[str, Any] | nn.Module, logits: Tensor, pre_logits: Tensor | None) -> nn.Module:
    """Return the module, on the device of its inputs, the teacher's outputs for one image.

    Raises:
        ValueError: a module that was built for other widths, or that does not return one value per sample.
    """
    if isinstance(guide, Mapping):
        keywords = {name: value for name, value in guide.items() if name != "use_features"}
        return GuideHead(logits.shape[1], 0 if pre_logits is None else pre_logits.shape[1], **keywords).to(
            logits.device
        )
    guide.to(logits.device)
    inputs = [value for value in (logits, pre_logits) if value is not None]
    shapes = ", ".join(
        f"{name} {tuple(value.shape)}" for name, value in zip(("logits", "pre-logits"), inputs, strict=False)
    )
    try:
        with in_mode(guide, training=False), torch.no_grad():
            found = guide(*inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the guide must read the teacher's {shapes}, but {type(guide).__name__} cannot: {error}"
        ) from error
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (1,):
        raise ValueError(f"the guide must return one logit per sample, of shape (1,) for one image, got {shape}")
    return guide
