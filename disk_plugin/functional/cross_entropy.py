"""Cross-entropy per position."""

from torch import Tensor
from torch.nn.functional import log_softmax


def label_cross_entropy(log_probs: Tensor, label: Tensor) -> Tensor:
    """Return -log s_label per position, nats."""
    return -log_probs.gather(1, label.unsqueeze(1)).squeeze(1)


def cross_entropy(
    student_logits: Tensor, target: Tensor, label: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """Return ``F.cross_entropy(reduction="none")``, nats, for probabilities ``target``, else for the class ``label``.

    That function would silently ignore a label of -100, even if the caller's ``ignore_index`` is another.
    """
    log_probs = log_softmax(student_logits, 1)
    if weight is not None:
        log_probs = log_probs * weight.detach().to(log_probs.dtype).reshape(-1, *[1] * (log_probs.ndim - 2))
    if target.is_floating_point():
        ce = -(target.to(log_probs.dtype) * log_probs).sum(1)
    else:
        ce = label_cross_entropy(log_probs, label)
    # the mean over the classes is the cross-entropy to the uniform distribution
    return (1 - label_smoothing) * ce - label_smoothing * log_probs.mean(1) if label_smoothing else ce
