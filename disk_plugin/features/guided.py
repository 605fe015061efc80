"""Any distillation loss weighted by the guide, per sample: Kag et al. (ICLR 2023), A.7."""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor, nn

from .. import _checks
from ..guide import reads_features
from ..loss import DiSKLoss
from .method import Method, Outputs, PlainLoss, to_outputs
from .weighing import (
    FEATURE_WEIGHTS,
    FeatureWeight,
    GuidedFeatureTerms,
    GuidedTerms,
    Weighing,
    feature_weights,
    from_disk_terms,
    weighed,
)

__all__ = [
    "FEATURE_WEIGHTS",
    "FeatureWeight",
    "Guided",
    "GuidedFeatureTerms",
    "GuidedTerms",
    "feature_weights",
    "guided_feature_terms",
]


class Guided(nn.Module):
    r"""Weights any distillation loss by the guide, per sample: Kag et al. (ICLR 2023), A.7, eq. (6).

    $$\beta\,\tfrac1N\sum_i w(g(x_i))\,\ell_i \;[+\;\text{DiSK's student half}]$$

    Here $\ell_i$ are the method's losses per sample. The guide learns from eq. (5) of the method's prediction, with the
    student fixed, and not from the method's losses (see ``guided_feature_terms``). Without a method this is DiSK
    itself, with the same kind of terms.

    **This module has parameters**, the guide's and the method's: give ``trainable_parameters()`` to the optimizer.

    Args:
        disk: the loss that owns the guide.
        method: a ``Method``, or any callable (student_logits, teacher_logits, target) -> losses (N,); None for
            DiSK alone.
        weight: which w: ``"one_minus_guide"``, ``"one_minus_discount"``, ``"guide"`` or ``"uniform"`` (w = 1), see
            ``feature_weights``.
        method_weight: beta, >= 0.
        logit_loss: whether to add ce_weight CE + distill_weight L_dist of the prediction to the student's loss, in the
            place of the method's losses in ``scaffolded``; None for a method that has some.

    Shape:
        logits (N, C) or (N, C, d1, ...); losses (N,) or (N, d1, ...); returns a scalar.

    Raises:
        ValueError: values out of range; in ``forward``, losses that are not one value per sample.
        TypeError: ``disk`` is not a ``DiSKLoss``, ``method`` cannot be called.

    Examples:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> guided = Guided(DiSKLoss(GuideHead(10)), lambda s, t, y: F.mse_loss(s, t, reduction="none").mean(1))
        >>> student_logits = torch.randn(4, 10, requires_grad=True)
        >>> guided(student_logits, torch.randn(4, 10), torch.arange(4)).backward()
    """

    def __init__(
        self,
        disk: DiSKLoss,
        method: Method | Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        *,
        weight: FeatureWeight = "one_minus_guide",
        method_weight: float = 1.0,
        logit_loss: bool | None = None,
    ) -> None:
        super().__init__()
        _check_disk(disk)
        if method is not None and not callable(method):
            raise TypeError(f"method must be a Method or a callable, got {type(method).__name__}")
        _checks.choice("weight", weight, FEATURE_WEIGHTS)
        _checks.number("method_weight", method_weight, at_least=0)
        self.disk = disk
        self.method = method if method is None or isinstance(method, Method) else PlainLoss(method)
        if logit_loss is None:
            logit_loss = self.method is not None and bool(self.method.scaffolded)
        self.weight, self.method_weight, self.logit_loss = weight, float(method_weight), bool(logit_loss)
        self._reads_features = reads_features(disk.guide)

    def forward(
        self,
        student: Tensor | Outputs,
        teacher: Tensor | Outputs,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return ``terms(...).loss``; logits are enough for a method that reads nothing else."""
        return self.terms(student, teacher, target, sample_weight=sample_weight).loss

    def terms(
        self,
        student: Tensor | Outputs,
        teacher: Tensor | Outputs,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> GuidedTerms:
        """Evaluate method and guide; the guide reads the teacher's logits and, if built so, its features."""
        _checks.choice("reduction", reduction, ("mean", "none"))
        student, teacher = to_outputs(student), to_outputs(teacher)
        terms = self.weigh(*self.evaluate(student, teacher, target), sample_weight=sample_weight)
        return terms.mean() if reduction == "mean" else terms

    def evaluate(
        self, student: Outputs, teacher: Outputs, target: Tensor
    ) -> tuple[Tensor, Tensor, Outputs, dict[str, Tensor]]:
        """Return the first arguments of ``weigh``: prediction, target, teacher's outputs and the method's losses."""
        if self.method is None:
            return student.logits, target, teacher, {}
        logits, losses = self.method.evaluate(student, teacher, target)
        return logits, target, teacher, losses

    def weigh(
        self,
        logits: Tensor,
        target: Tensor,
        teacher: Outputs,
        losses: Mapping[str, Tensor],
        *,
        guide_logits: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> GuidedTerms:
        """Weight the losses per sample that ``Method.evaluate`` returned, for a host that calls it elsewhere.

        ``guide_logits`` is what ``disk.guide_logits`` returned, if that is called elsewhere too.
        """
        terms = self.disk.terms(
            logits,
            teacher.logits,
            target,
            self.features_of(teacher),
            guide_logits=guide_logits,
            sample_weight=sample_weight,
            reduction="none",
        )
        if self.method is None:
            return from_disk_terms(terms)
        names = self.method.unguided, self.method.scaffolded
        how = Weighing(self.weight, self.method_weight, self.logit_loss, *names)
        return weighed(terms, losses, logits, sample_weight, how)

    def features_of(self, teacher: Outputs) -> Tensor | None:
        """Return the teacher's features if the guide reads them, else None: they may be there for the method alone."""
        return teacher.features if self._reads_features else None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters to train beside the student's: the guide's and the method's."""
        guide = [parameter for parameter in self.disk.parameters() if parameter.requires_grad]
        return guide if self.method is None else guide + self.method.trainable_parameters()

    def requires_grad_(self, requires_grad: bool = True) -> "Guided":
        """Change the guide and what the method trains, not what the method keeps frozen."""
        for module in self.children():
            module.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        """Show the settings."""
        shown = f"weight={self.weight!r}, method_weight={self.method_weight}, logit_loss={self.logit_loss}"
        return "" if self.method is None else shown


def guided_feature_terms(
    disk: DiSKLoss,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    teacher_features: Tensor | None,
    feature_error: Tensor,
    *,
    weight: FeatureWeight = "one_minus_guide",
    feature_weight: float = 1.0,
    logit_loss: bool = False,
    guide_logits: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> GuidedTerms:
    r"""Evaluate a feature-matching loss weighted by the guide: Kag et al. (ICLR 2023), A.7, eq. (6).

    $$\beta\,\tfrac1N\sum_i w(g(x_i))\,\|\Psi(f_S(x_i)) - f_T(x_i)\|^2$$

    It is normalised by N, not by the sum of w. Student and connector Psi receive the gradient of this term with g
    fixed, and that of DiSK's own student half if ``logit_loss``. The guide receives the gradient of the scaffold and
    the budget of eq. (5) with the student fixed, and **not** that of the feature term, which it would minimise by w =
    0. With ``"uniform"``, or where w = 1, the student's gradient is that of the feature-matching method itself, bit for
    bit.

    Args:
        disk: the loss that owns the guide.
        student_logits: the logits of inference, before softmax (they may be the teacher's classifier on Psi f_S).
        teacher_logits: before softmax.
        target: class indices or probabilities.
        teacher_features: for a guide that reads them, else None.
        feature_error: squared distance per sample, a mean over its elements; half precision is upcast to float32.
        weight: which w, see ``feature_weights``.
        feature_weight: beta, >= 0.
        logit_loss: whether to add ce_weight CE + distill_weight L_dist of ``student_logits`` to the student's loss.
        guide_logits: what ``disk.guide_logits`` returned, if that is called elsewhere (see ``DiSKLoss.terms``).
        sample_weight: weight per sample or target, of all terms; means still divide by the number of targets.
        reduction: ``"mean"`` over the non-ignored targets, or ``"none"``.

    Shape:
        logits (N, C) or (N, C, d1, ...); target (N, d1, ...) or the logits'; teacher_features (N, D) or
        (N, D, d1, ...); feature_error (N,) or (N, d1, ...).

    Returns:
        The loss, its halves and values to log, see ``GuidedTerms``.

    Raises:
        ValueError: an unknown ``weight``, shapes that do not fit, ``feature_weight`` < 0.
        TypeError: ``disk`` is not a ``DiSKLoss``.
    """
    _checks.number("feature_weight", feature_weight, at_least=0)
    _checks.choice("reduction", reduction, ("mean", "none"))
    _check_disk(disk)
    _checks.choice("weight", weight, FEATURE_WEIGHTS)
    terms = disk.terms(
        student_logits,
        teacher_logits,
        target,
        teacher_features,
        guide_logits=guide_logits,
        sample_weight=sample_weight,
        reduction="none",
    )
    how = Weighing(weight, feature_weight, logit_loss, frozenset())
    found = weighed(terms, {"feature_error": feature_error}, student_logits, sample_weight, how)
    return found.mean() if reduction == "mean" else found


def _check_disk(disk: object) -> None:
    if not isinstance(disk, DiSKLoss):
        raise TypeError(f"disk must be a DiSKLoss, got {type(disk).__name__}")
