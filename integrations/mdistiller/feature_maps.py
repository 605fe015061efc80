"""The guide's input, and the maps that methods match, among the features of the host's models.

A model of the host returns ``(logits, {"feats": [...], "pooled_feat": ...})``, most with ``"preact_feats": [...]`` too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from disk_plugin.features.method import BEFORE_LAST_MAP, LAST_MAP, Method, Outputs, Pair
from disk_plugin.taps import TeacherTail, get_tail
from disk_plugin.taps.classifier import check_classifier, pooled_classifier

from . import loaders

Features = dict[str, Any]
ReadMap = Callable[[Features], Tensor]

_INPUT_SIZES = {"cifar100": 32, "tiny_imagenet": 64, "imagenet": 224}

# In a wide ResNet a BatchNorm lies between feats[-1] and the pooling, which only preact_feats[-1] includes: with
# trained weights no ReLU of feats[-1] gives its logits.
_TEACHER_MAPS: tuple[ReadMap, ...] = (
    lambda features: features["preact_feats"][-1].relu(),
    lambda features: features["feats"][-1],
    lambda features: features["feats"][-1].relu(),
)


def noise(model: nn.Module, cfg: CfgNode) -> Tensor:
    """Return two images of noise on the model's device, without changing the random state."""
    size = _INPUT_SIZES.get(cfg.DATASET.TYPE)
    shape = loaders.image_shape(cfg) if size is None else (3, size, size)
    drawn = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(next(model.parameters()).device)


@torch.no_grad()
def probe(model: nn.Module, cfg: CfgNode) -> tuple[Tensor, Features]:
    """Return logits and features of two images of noise, without changing the model or the random state."""
    modes = {module: module.training for module in model.modules()}
    try:
        logits, features = outputs_of(model.eval(), noise(model, cfg))
    finally:
        for module, training in modes.items():
            module.training = training
    return logits, features


def outputs_of(model: nn.Module, image: Tensor) -> tuple[Tensor, Features]:
    """Return logits and features, none of a model that returns logits alone.

    Raises:
        ValueError: the model returns something else.
    """
    found = model(image)
    if isinstance(found, Tensor):
        return found, {}
    if isinstance(found, tuple | list) and len(found) > 1 and isinstance(found[0], Tensor):
        if isinstance(found[1], dict):
            return found[0], found[1]
        shown = f"(Tensor, {type(found[1]).__name__})"
    else:
        shown = type(found).__name__
    raise ValueError(
        f"a model of the host returns (logits, features by name), {type(model).__name__} returns {shown}: it has no "
        f"'feats' and 'pooled_feat' to read"
    )


def pooled(features: Features) -> Tensor:
    """Return the pooled features (N, D), which the guide reads."""
    if "pooled_feat" not in features:
        raise ValueError(
            f"the model returns features {sorted(features)} without 'pooled_feat': set DISK.GUIDE.USE_FEATURES False"
        )
    return features["pooled_feat"].flatten(1)


def student_map(features: Features) -> Tensor:
    """Return the last map (N, C, H, W) that the student's features hold, activated where the host says how."""
    if "preact_feats" in features:
        return features["preact_feats"][-1].relu()
    if "feats" not in features:
        raise ValueError(f"a method reads the last map, the model returns features {sorted(features)} without 'feats'")
    return features["feats"][-1]


def map_before_last(features: Features) -> Tensor:
    """Return the map (N, C, H, W) before the one of ``student_map``, activated likewise.

    Raises:
        ValueError: the model shows fewer than two maps, or one that is no map.
    """
    found: Any = features.get("preact_feats", features.get("feats", []))
    if len(found) < 2 or any(each.ndim != 4 for each in found[-2:]) or found[-2].shape[2] < found[-1].shape[2]:
        shapes = [tuple(each.shape) for each in found]
        raise ValueError(
            f"a method reads the map before the last one: 'feats' must end with two maps (N, C, H, W), the first at "
            f"least as large as the second, got {shapes}"
        )
    return found[-2].relu() if "preact_feats" in features else found[-2]


def shown(
    logits: Tensor, features: Features, reads: frozenset[str], read_map: ReadMap = student_map, model: Any = None
) -> Outputs:
    """Return a model's output as far as a method reads it; ``model`` for one that reads its last layer."""
    maps = {LAST_MAP: read_map(features)} if LAST_MAP in reads else {}
    if BEFORE_LAST_MAP in reads:
        maps[BEFORE_LAST_MAP] = map_before_last(features)
    head = None
    if "head" in reads and model is not None:  # looked up per call, as a replica has its own
        head = next((module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear)), None)
    return Outputs(logits, pooled(features) if "features" in reads else None, maps, head)


def build_method(
    kind: type[Method], student: nn.Module, teacher: nn.Module, cfg: CfgNode, settings: dict[str, Any]
) -> tuple[Method, ReadMap]:
    """Build the method for a pair; return it with the function that reads the teacher's map.

    Raises:
        ValueError: the method reads what the host's models do not return, or cannot use the pair; the message says why.
    """
    unknown = (kind.reads_of("student") | kind.reads_of("teacher")) - {"features", "head", LAST_MAP, BEFORE_LAST_MAP}
    if unknown:
        raise ValueError(
            f"the host's models show 'features', 'head' and the maps 'last' and 'before_last', {kind.__name__} reads "
            f"{sorted(unknown)}"
        )
    names = f"teacher {cfg.DISTILLER.TEACHER}, student {cfg.DISTILLER.STUDENT}"
    logits, features = probe(teacher, cfg)
    read, reasons = None, ["the teacher has no nn.Linear layer"]
    linear = [module for module in teacher.modules() if isinstance(module, nn.Linear)]
    if linear and LAST_MAP in kind.reads_of("teacher"):
        classifier = pooled_classifier(linear[-1]).to(logits.device)
        read, reasons = _read_by(classifier, logits, features)

    def head() -> nn.Module:
        if read is None:
            raise ValueError(f"{kind.__name__} cannot reuse the classifier of {names}: {reasons[0]}")
        return classifier

    def tail(**options: Any) -> TeacherTail:
        return get_tail(teacher.eval(), noise(teacher, cfg), **options)

    student_logits, student_features = probe(student, cfg)
    read_map = read or student_map
    try:
        seen = shown(student_logits, student_features, kind.reads_of("student"), model=student)
        pair = Pair(seen, shown(logits, features, kind.reads_of("teacher"), read_map), head, tail)
        return kind.for_pair(pair, **settings), read_map
    except ValueError as error:
        raise ValueError(f"{error}" if names in str(error) else f"{error} ({names})") from error


def _read_by(classifier: nn.Module, logits: Tensor, features: Features) -> tuple[ReadMap | None, list[str]]:
    """Return the function that reads the map from which the classifier makes the logits, or None and the reasons."""
    reasons = []
    for candidate in _TEACHER_MAPS:
        try:
            check_classifier(classifier, candidate(features), logits)
        except KeyError:
            continue  # a model without such features
        except ValueError as error:
            reasons.append(str(error))
        else:
            return candidate, []
    return None, reasons
