"""Decoupled knowledge distillation, Zhao et al. (CVPR 2022), per sample."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .. import _checks
from ..functional._positions import promote, without_ignored
from .method import Method, Outputs


class DKD(Method):
    r"""Decoupled knowledge distillation, Zhao et al. (CVPR 2022), eq. (7), and the cross-entropy added to it.

    $$\tau^2\,\big(\alpha\,KL(b^T || b^S) + \beta\,KL(\hat p^T || \hat p^S)\big)$$

    Here b are the probabilities of (label, any other class), and p-hat those of the other classes, renormalized. The
    guide does not weight the cross-entropy. Half-precision logits are upcast to float32. All is computed in log space;
    the authors' code subtracts 1000 from the label's logit instead.

    Args:
        ce_weight: weight of the cross-entropy, >= 0.
        alpha: weight of the target-class part, >= 0.
        beta: weight of the non-target-class part, >= 0.
        temperature: divides both logits, dimensionless, > 0.
        warmup_epochs: epochs over which the distillation's weight rises to 1, as in the authors' code; 0 for none. It
            takes effect where ``begin_epoch`` is called; otherwise the weight is 1.

    Shape:
        logits (N, C) or (N, C, d1, ...), C >= 2; target class indices (N, d1, ...), or probabilities of the logits'
        shape, whose argmax is the target class. Returns the losses ``ce`` and ``dkd``, (N, d1, ...), 0 for class
        indices outside 0 to C - 1.

    Raises:
        ValueError: values out of range; in ``forward``, shapes that do not fit.
        TypeError: values of another type; in ``forward``, a target that is neither int64 nor floating-point.

    Examples:
        >>> import torch
        >>> losses = DKD()(Outputs(torch.randn(4, 10)), Outputs(torch.randn(4, 10)), torch.arange(4))
        >>> {name: tuple(loss.shape) for name, loss in losses.items()}
        {'ce': (4,), 'dkd': (4,)}
    """

    unguided = frozenset({"ce"})
    share: Tensor

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup_epochs: int = 20,
    ) -> None:
        super().__init__()
        for name, value in {"ce_weight": ce_weight, "alpha": alpha, "beta": beta}.items():
            _checks.number(name, value, at_least=0)
        _checks.number("temperature", temperature, above=0)
        _checks.integer("warmup_epochs", warmup_epochs, at_least=0)
        self.ce_weight, self.alpha, self.beta = float(ce_weight), float(alpha), float(beta)
        self.temperature, self.warmup_epochs = float(temperature), int(warmup_epochs)
        self.register_buffer("share", torch.tensor(1.0), persistent=False)

    def begin_epoch(self, epoch: int) -> None:
        """Set the warm-up's weight for an epoch, counted from 0."""
        self.share.fill_(min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Return the losses ``ce`` and ``dkd`` per sample, multiplied by their weights."""
        _checks.logits(student.logits, teacher.logits)
        _checks.target(target, student.logits)
        s, t = promote(student.logits, teacher.logits.detach())
        if target.is_floating_point():
            label, counts = target.argmax(1), None
        else:
            counts = (target >= 0) & (target < s.shape[1])
            label = torch.where(counts, target, 0)
            s, t = without_ignored(s, counts), without_ignored(t, counts)
        ce = F.cross_entropy(s, label if counts is not None else target.to(s.dtype), reduction="none")
        distill = decoupled_kl(s / self.temperature, t / self.temperature, label, self.alpha, self.beta)
        losses = {"ce": self.ce_weight * ce, "dkd": self.share * self.temperature**2 * distill}
        return losses if counts is None else {name: torch.where(counts, each, 0.0) for name, each in losses.items()}

    def extra_repr(self) -> str:
        """Show the settings."""
        names = ("ce_weight", "alpha", "beta", "temperature", "warmup_epochs")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def decoupled_kl(student: Tensor, teacher: Tensor, label: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha TCKD + beta NCKD per target, nats, of logits already divided by the temperature."""
    index = label.unsqueeze(1)
    others = torch.ones_like(student, dtype=torch.bool).scatter(1, index, False)
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    pairs = zip(_label_and_others(log_t, index, others), _label_and_others(log_s, index, others), strict=True)
    binary = torch.stack([log_p.exp() * (log_p - log_q) for log_p, log_q in pairs]).sum(0)
    left_s, left_t = (value.masked_fill(~others, -math.inf).log_softmax(1) for value in (student, teacher))
    # -inf - -inf at the label would be NaN, in the gradient too
    left_s, left_t = (value.masked_fill(~others, 0.0) for value in (left_s, left_t))
    among = (torch.where(others, left_t.exp(), 0.0) * (left_t - left_s)).sum(1)
    return alpha * binary + beta * among


def _label_and_others(log_p: Tensor, index: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the label and of any other class."""
    return log_p.gather(1, index).squeeze(1), log_p.masked_fill(~others, -math.inf).logsumexp(1)
