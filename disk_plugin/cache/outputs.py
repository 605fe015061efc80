"""The teacher's outputs for batches of sample-views, and their storage as rows."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.data import DataLoader, Dataset

from .. import _checks
from .._modes import without_autocast
from ..taps import FeatureTap, logits_of, with_features
from ..taps.hooks import linear_names
from . import checksums
from .description import Meta
from .files import REMEDY
from .views import PlainView, SeededViews, get_image

MODES = ("features", "logits", "logits+features")


def check_mode(mode: str) -> None:
    """Raise ValueError if the mode is unknown.

    Raises:
        ValueError: listing the known modes.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")


class TeacherOutputs:
    """Runs a teacher: images -> logits and features, float32 on the CPU.

    Attributes:
        layer: dotted name of the layer that reads the features; None in mode ``"logits"``.
        head: that layer, if it will recompute the logits.
    """

    def __init__(self, teacher: nn.Module, mode: str, layer: str | None, device: torch.device | str | None) -> None:
        model = teacher.model if isinstance(teacher, FeatureTap) else teacher
        if layer is None and isinstance(teacher, FeatureTap):
            layer = teacher.layer
        if layer is None and mode == "features":  # named: then _check_head compares it with the logits, not the tap
            layer = next((name for name in reversed(linear_names(model))), None)
        self.mode = mode
        self._model = model if mode == "logits" else with_features(model, layer)
        self.layer = self._model.layer if isinstance(self._model, FeatureTap) else None
        self.head = None if self.layer is None or mode != "features" else _linear(model, self.layer)
        if device is not None:
            model.to(device)
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits (N, C) and features (N, D), None in mode ``"logits"``."""
        output = self._model(images.to(self._device))
        logits, features = output if self.layer is not None else (logits_of(output), None)
        for name, values in {"logits": logits, "features": features}.items():
            if values is not None and (values.ndim != 2 or len(values) != len(images)):
                raise ValueError(f"the teacher's {name} must be ({len(images)}, width), got {tuple(values.shape)}")
        if self.head is not None and features is not None:
            _check_head(self.head, logits, features)
        return logits.float().cpu(), None if features is None else features.float().cpu()

    def rows(self, images: Tensor) -> Tensor:
        """Return a batch's rows to store: (N, width) in float32, before rounding."""
        logits, features = self(images)
        if features is None:
            return logits
        return features if self.mode == "features" else torch.cat([logits, features], dim=1)

    def head_bytes(self) -> bytes:
        """Return the head as a file's content, empty without one."""
        if self.head is None:
            return b""
        weights = {name: value.detach().float().cpu() for name, value in self.head.state_dict().items()}
        content = io.BytesIO()
        torch.save({"weight": weights["weight"], "bias": weights.get("bias")}, content)
        return content.getvalue()


def read_head(path: Path, meta: Meta) -> tuple[Tensor, Tensor | None] | None:
    """Read a file of ``TeacherOutputs.head_bytes``: weight (C, D) and bias (C,); None without a head.

    Raises:
        RuntimeError: the file is damaged, or not ours.
    """
    if not meta.head_bytes:
        return None
    content = path.read_bytes()
    if meta.head_checksum is not None:
        checksums.check_file(path, content, meta.head_checksum)
    expected, cause = [(meta.num_classes, meta.feature_dim), (meta.num_classes,)], None
    try:
        head = torch.load(io.BytesIO(content), weights_only=True)
        weight, bias = head["weight"], head["bias"]
        came: Any = [tuple(each.shape) for each in (weight, bias) if each is not None]
    except Exception as error:  # a file that torch did not write may raise nearly anything
        came, cause = type(error).__name__, error
    if came not in (expected, expected[:1]):
        layer = f"the teacher's last layer, tensors of shape {expected[0]} and {expected[1]}"
        raise RuntimeError(f"{path} must hold {layer}, got {came}: {REMEDY}") from cause
    return weight, bias


def batches(
    views: SeededViews | PlainView, rows: Sequence[int], batch_size: int, num_workers: int
) -> DataLoader[tuple[Tensor, int]]:
    """Load the images of rows, in the given order, as batches (images, rows); row = view * samples + index."""
    _checks.integer("batch_size", batch_size, at_least=1)
    return DataLoader(
        _Rows(views),
        int(batch_size),  # numpy's integers pass our checks, not torch's
        sampler=rows,
        num_workers=int(num_workers),
        generator=torch.Generator(),  # otherwise the workers' seed would be drawn from the global generator
    )


def to_half(rows: Tensor, places: Tensor, meta: Meta) -> Tensor:
    """Round to float16; values out of its range raise (bfloat16's is wider).

    Raises:
        ValueError: a value is not finite in float16; the message names its place.
    """
    rounded = rows.half()
    misfits = (~rounded.isfinite()).nonzero()
    if len(misfits):
        row, column = misfits[0].tolist()
        view, index = divmod(int(places[row]), meta.samples)
        logits = meta.width - meta.feature_dim
        name = f"logit {column}" if column < logits else f"feature {column - logits}"
        raise ValueError(
            f"the teacher's outputs must be finite in float16 (up to 65504), got {rows[row, column].item()} at index "
            f"{index}, view {view}, {name}: bound it in the teacher, or mask what is read instead of what is written"
        )
    return rounded


class _Rows(Dataset[tuple[Tensor, int]]):
    """Images by row."""

    def __init__(self, views: SeededViews | PlainView) -> None:
        self._views = views

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        view, index = divmod(row, len(self._views))
        return get_image(self._views.item(index, view)), row


def _check_head(head: nn.Linear, logits: Tensor, features: Tensor) -> None:
    """Raise ValueError unless the head reproduces the logits from float16 features, up to their rounding."""
    weight, bias, rounded = head.weight.float(), None if head.bias is None else head.bias.float(), features.half()
    if not rounded.isfinite().all():
        return  # to_half raises for it
    if not logits.isfinite().all():
        raise ValueError(
            f"the teacher's logits must be finite, got {logits[~logits.isfinite()][0].item()} in {logits.dtype} from "
            "finite features: write in float32 or bfloat16, without float16 autocast"
        )
    device = logits.device.type
    own = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else logits.dtype
    with without_autocast(logits):
        recomputed = linear(rounded.float(), weight, bias)
        size = linear(rounded.float().abs(), weight.abs(), None if bias is None else bias.abs())
    # float16's relative error is at most 2**-11; the teacher itself may have computed in half precision
    allowed = (2**-10 + 2 * torch.finfo(own).eps) * size + 1e-6
    if recomputed.shape != logits.shape or not ((recomputed - logits).abs() <= allowed).all():
        raise ValueError(
            "mode 'features' needs a teacher whose last Linear makes its logits, got others when they are recomputed "
            "by it: use mode='logits' or 'logits+features'"
        )


def _linear(model: nn.Module, layer: str) -> nn.Linear:
    head = model.get_submodule(layer)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"mode 'features' needs a Linear as layer, got {type(head).__name__} {layer!r}: use another")
    return head
