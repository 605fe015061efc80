"""Which of the host's features are what: the guide's input, and the maps that SimKD matches.

A model of the host returns ``(logits, {"feats": [...], "pooled_feat": ..., most: "preact_feats": [...]})``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from disk_plugin.features.simkd import SimKD, check_classifier, pooled_classifier

Features = dict[str, Any]

_INPUT_SIZES = {"cifar100": 32, "tiny_imagenet": 64, "imagenet": 224}

# In a wide ResNet a BatchNorm lies between feats[-1] and the pooling, which only preact_feats[-1] includes: with
# trained weights no ReLU of feats[-1] gives its logits.
_TEACHER_MAPS: tuple[Callable[[Features], Tensor], ...] = (
    lambda features: features["preact_feats"][-1].relu(),
    lambda features: features["feats"][-1],
    lambda features: features["feats"][-1].relu(),
)


@torch.no_grad()
def probe(model: nn.Module, cfg: CfgNode) -> tuple[Tensor, Features]:
    """Return logits and features of two images of noise; neither the model nor the random state is changed."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    size = _INPUT_SIZES.get(cfg.DATASET.TYPE, 32)
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        logits, features = model.eval()(noise)
    finally:
        for module, training in modes.items():
            module.training = training
    return logits, features


def pooled(features: Features) -> Tensor:
    """Return the pooled features (N, D), which the guide reads."""
    if "pooled_feat" not in features:
        raise ValueError(
            f"the teacher returns features {sorted(features)} without 'pooled_feat': set DISK.GUIDE.USE_FEATURES False"
        )
    return features["pooled_feat"].flatten(1)


def student_map(features: Features) -> Tensor:
    """Return the last map (N, C, H, W) that the student's features hold, activated where the host says how."""
    return features["preact_feats"][-1].relu() if "preact_feats" in features else features["feats"][-1]


def build_simkd(
    student: nn.Module, teacher: nn.Module, cfg: CfgNode, *, factor: int
) -> tuple[SimKD, Callable[[Features], Tensor]]:
    """Return SimKD for the pair, and how to read the teacher's map.

    Raises:
        ValueError: the teacher's classifier cannot be reused; the message says why.
    """
    names = f"teacher {cfg.DISTILLER.TEACHER}, student {cfg.DISTILLER.STUDENT}"
    logits, features = probe(teacher, cfg)
    linear = [module for module in teacher.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"SimKD cannot reuse the classifier of {names}: the teacher has no nn.Linear layer")
    classifier = pooled_classifier(linear[-1]).to(logits.device)
    read, reasons = None, []
    for candidate in _TEACHER_MAPS:
        try:
            check_classifier(classifier, candidate(features), logits)
        except KeyError:
            continue  # a model without such features
        except ValueError as error:
            reasons.append(str(error))
        else:
            read = candidate
            break
    if read is None:
        raise ValueError(f"SimKD cannot reuse the classifier of {names}: {reasons[0]}")
    teacher_shape, student_shape = read(features).shape, student_map(probe(student, cfg)[1]).shape
    if len(student_shape) != 4:
        raise ValueError(f"SimKD needs a map (N, C, H, W) of the student, {names} gives {tuple(student_shape)}")
    size = (teacher_shape[2], teacher_shape[3])
    simkd = SimKD(student_shape[1], teacher_shape[1], classifier, teacher_size=size, factor=factor)
    return simkd, read
