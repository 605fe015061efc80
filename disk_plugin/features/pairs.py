"""A student and a teacher for which a method is built, in a loop of one's own: ``pair_of``."""

from typing import Any

import torch
from torch import Tensor, nn

from .._modes import in_mode
from ..taps.classifier import last_classifier
from ..taps.maps import MapTap
from ..taps.tails import TeacherTail, get_tail
from .method import LAST_MAP, Outputs, Pair


def pair_of(student: MapTap, teacher: MapTap, images: Tensor) -> Pair:
    """Try two models that show their maps on a batch, for ``Method.for_pair``.

    Args:
        student: result of ``taps.with_maps``.
        teacher: result of ``taps.with_maps``; its model must be in evaluation mode.
        images: (N, C, H, W), a batch that is not constant, of the size that both will be trained with.

    Raises:
        ValueError: a model that cannot read the images; logits of other shapes.
        TypeError: a model that is not the result of ``with_maps``.

    Examples:
        >>> import torch
        >>> from disk_plugin.features import ScaleKD
        >>> from disk_plugin.taps import with_maps
        >>> class Net(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.layer3 = nn.Conv2d(3, width, 2, stride=2)
        ...         self.layer4 = nn.Conv2d(width, 2 * width, 2, stride=2)
        ...         self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, 10)
        ...     def forward(self, x):
        ...         return self.fc(self.avgpool(self.layer4(self.layer3(x))).flatten(1))
        >>> paths = {"before_last": "layer3", "last": "layer4"}
        >>> student, teacher = with_maps(Net(8), paths), with_maps(Net(16).eval(), paths)
        >>> scalekd = ScaleKD.for_pair(pair_of(student, teacher, torch.randn(2, 3, 8, 8)))
        >>> scalekd.features.tail.final_size
        (2, 2)
    """
    shown = {"student": _try("student", student, images), "teacher": _try("teacher", teacher, images)}
    if shown["student"].logits.shape != shown["teacher"].logits.shape:
        shapes = [tuple(each.logits.shape) for each in shown.values()]
        raise ValueError(f"student and teacher must have logits of one shape, got {shapes[0]} and {shapes[1]}")

    def head() -> nn.Module:
        return last_classifier(teacher.model, shown["teacher"].maps[LAST_MAP], shown["teacher"].logits)

    def tail(**options: Any) -> TeacherTail:
        return get_tail(teacher.model, images, **options)

    return Pair(shown["student"], shown["teacher"], head, tail)


def _try(name: str, tap: MapTap, images: Tensor) -> Outputs:
    if not isinstance(tap, MapTap):
        raise TypeError(f"{name} must be a MapTap, the result of taps.with_maps(model), got {type(tap).__name__}")
    try:
        with in_mode(tap, training=False), torch.no_grad():
            logits, maps = tap(images)
    except (AssertionError, RuntimeError) as error:
        size = tuple(images.shape[1:])
        raise ValueError(f"student and teacher see the same images, of size {size}, but the {name}: {error}") from error
    return Outputs(logits, maps=maps)
