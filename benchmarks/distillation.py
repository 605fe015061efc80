"""KD and DKD computed as in mdistiller, by softmax and kl_div. Logits are (N, C), target (N,)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Return the distillation term of Hinton et al. (2015), tau^2 KL(t || s), of softened distributions."""
    log_student = log_softmax(student_logits / temperature, 1)
    teacher = softmax(teacher_logits / temperature, 1)
    return temperature**2 * kl_div(log_student, teacher, reduction="batchmean")


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Return cross-entropy and distillation, .1 and .9, at temperature 4."""
    return 0.1 * cross_entropy(student_logits, target) + 0.9 * kl_loss(student_logits, teacher_logits)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    target_weight: float = 1.0,
    others_weight: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Return cross-entropy and decoupled distillation, Zhao et al. (CVPR 2022), eq. (7).

    tau^2 (alpha TCKD + beta NCKD): the divergence of (label, any other), and that among the others.
    """
    label = torch.zeros_like(student_logits, dtype=torch.bool).scatter_(1, target.unsqueeze(1), value=True)
    student, teacher = student_logits / temperature, teacher_logits / temperature
    on_label = kl_div(_label_or_other(student, label).log(), _label_or_other(teacher, label), reduction="batchmean")
    student, teacher = (logits - 1000.0 * label for logits in (student, teacher))  # no weight for the label
    among_others = kl_div(log_softmax(student, 1), softmax(teacher, 1), reduction="batchmean")
    distill = temperature**2 * (target_weight * on_label + others_weight * among_others)
    return cross_entropy(student_logits, target) + distill


def _label_or_other(logits: Tensor, label: Tensor) -> Tensor:
    """Return the probabilities of the label and of any other class, (N, 2)."""
    probabilities = softmax(logits, 1)
    return torch.stack([(probabilities * label).sum(1), (probabilities * ~label).sum(1)], 1)
