"""A teacher's classifier as a module from its last feature map to its logits, and a check of it."""

import torch
from torch import Tensor, nn

# a wrong map or classifier differs by the size of the logits, another order of pooling by rounding
_RELATIVE_TOLERANCE = 1e-3


def pooled_classifier(linear: nn.Module) -> nn.Sequential:
    """Return the usual classifier of a feature map: global average pooling, then the teacher's last layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def last_classifier(model: nn.Module, last_map: Tensor, logits: Tensor) -> nn.Module:
    """Return the model's last Linear behind a global pooling, checked to make its logits from its last map.

    Raises:
        ValueError: the model has no Linear layer, or the two do not make the logits.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("the teacher has no nn.Linear layer")
    classifier = pooled_classifier(linear[-1])
    check_classifier(classifier, last_map, logits)
    return classifier


@torch.no_grad()
def check_classifier(classifier: nn.Module, teacher_map: Tensor, teacher_logits: Tensor) -> None:
    """Raise ValueError unless ``classifier(teacher_map)`` reproduces the teacher's logits.

    The comparison is relative to the logits' size, as deep networks amplify rounding. Check trained weights on an input
    that is not constant: a BatchNorm between map and classifier is not detected at its initial values.

    Args:
        classifier: a module from a feature map to logits.
        teacher_map: (N, D, H, W), the classifier's input.
        teacher_logits: (N, C), the teacher's logits for the same images.

    Raises:
        ValueError: it does not; the message says why.
    """
    if teacher_map.ndim != 4:
        raise ValueError(f"teacher_map must have shape (N, D, H, W), got {tuple(teacher_map.shape)}")
    try:
        logits = classifier(teacher_map)
    except RuntimeError as error:
        widths = [layer.in_features for layer in classifier.modules() if isinstance(layer, nn.Linear)]
        reads = f"reads {widths[0]} features" if widths else "cannot read it"
        raise ValueError(
            f"the classifier {reads}, but the teacher's last map has {teacher_map.shape[1]} channels: {error}"
        ) from error
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"the classifier makes logits of shape {tuple(logits.shape)}, the teacher {tuple(teacher_logits.shape)}"
        )
    difference = ((logits - teacher_logits).norm() / teacher_logits.norm()).item()
    if not difference <= _RELATIVE_TOLERANCE:
        raise ValueError(
            f"the classifier on the teacher's last map does not reproduce the teacher's logits: relative difference "
            f"{difference:.2g}, expected at most {_RELATIVE_TOLERANCE:g}; something lies between map and classifier"
        )
