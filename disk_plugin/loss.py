"""DiSKLoss: holds the arguments and the guide; the functional API holds the formulas."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _checks
from ._form import format_settings, remaining_weight, resolve_form
from ._modes import without_autocast
from ._state import moving
from ._training_batch import evaluate_batch
from ._watch import note_student, warn_without_ce
from .epoch_statistics import NOTHING_SEEN, EpochStatistics, no_statistics, upgrade
from .functional import DiSKTerms
from .functional._positions import REDUCTIONS, Reduction, guide_input
from .functional._settings import Settings
from .variants import Variant, resolve_variant


class DiSKLoss(nn.Module):
    r"""DiSK as a criterion. **This loss has parameters**, those of its guide: give them to an optimizer.

    The objective of Kag et al. (ICLR 2023), eq. (5):

    $$\alpha\,L_{CE}(s) + (1-\alpha)\,L_{dist}(s, g) + \lambda\,\Big(\tfrac1N\sum_i g_i CE_i - \delta\Big)_+$$

    In one backward, student and guide each receive only their own gradient (stop-gradient on the other). For Algorithm
    1's alternation, backpropagate ``terms(...).guide_loss`` and ``terms(...).student_loss`` in turn. g is bounded in
    one of two ways:

    - **discount** (the default, not in the paper): the guide ranks the samples, and after each batch the loss adjusts
      the level of g so that the mean discount, the share of the teacher's pull that is taken off, meets a target
      (``disk_plugin.level.DiscountLevel``). There is no hinge and ``multiplier`` is 0.
    - **budget** (the paper's), in nats: if ``multiplier`` or ``budget`` is given, ``discount=None``, or the variant has
      rules for it. Both are buffers, so a loaded checkpoint overrides the constructor's.

    ``DualScheduler`` sets the training progress for the first and schedules the second. A
    ``disk_plugin.uniform.UniformGuide`` bounds its own g. Where the authors' code differs from the paper, ``variant``
    selects the rules. By default all classes receive g; with ``top_k`` the others keep their full pull.

    Half-precision inputs are upcast to float32, under autocast too. NaN in an input, or inf in the teacher's logits,
    propagates to the loss, unless its target is ignored. Double backward needs ``functional.reference_terms``. Under
    ``torch.func`` statistics are updated only with the buffers. In ``AveragedModel(disk)`` leave ``use_buffers`` False.

    Args:
        guide: a module (teacher_logits[, teacher_features]) -> guide logits (N,) or (N, d1, ...).
        ce_weight: weight of the cross-entropy, >= 0 (paper: alpha).
        distill_weight: weight of the scaffolded divergence, >= 0; None for 1 - ce_weight, at least 0 (the paper's).
        temperature: divides the teacher's logits, dimensionless, > 0 (paper: tau).
        student_temperature: divides the student's logits, > 0; None for ``temperature``; ``"fit"`` for the paper's
            argmin of the KL divergence, tracked by one Newton step per training batch and kept in a buffer.
        top_k: number of the teacher's largest classes that receive g, >= 1; None for all (paper: K).
        discount: target of the mean discount, in [0, .99], or ``"auto"``, which follows the student; None for a budget.
        multiplier: weight of the budget's hinge, >= 0; None for 50 (paper: lambda).
        budget: bound of the mean usage g * CE, nats per sample, >= 0; None for .3 (paper: delta; ``estimate_budget``).
        variant: ``"paper"``, ``"official_cifar"``, ``"official_imagenet"`` or a ``Variant``.
        guide_gradient_scale: with a budget, a factor > 0 that keeps the guide alive under the student's SGD, see
            ``disk_plugin.functional.disk_terms``. None: the gradient w.r.t. the guide's logit, as in the paper.
        ignore_index: target value that is ignored and does not contribute to any gradient, whatever inputs hold there.
        weight: weight of each class in the cross-entropy, (C,). Means divide by the number of targets, not by weights.
        label_smoothing: smoothing of the cross-entropy alone, in [0, 1), as in ``nn.CrossEntropyLoss``.

    Attributes:
        level: the module that holds the discount, or None with a budget.
        reduce_mean: None, or what averages a scalar over the ranks that share a batch; ``distributed.attach`` sets it.

    Shape:
        student_logits, teacher_logits (N, C) or (N, C, d1, ...); target int64 (N, d1, ...) or probabilities of the
        logits' shape; teacher_features (N, D) or (N, D, d1, ...); sample_weight (N,) or (N, d1, ...). Returns a scalar.

    Raises:
        ValueError: values out of range or in conflict, an unknown variant; in ``forward`` shapes that do not fit.
        TypeError: ``guide`` is not a module; values or tensors of another type.

    Examples:
        >>> import torch
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> disk = DiSKLoss(GuideHead(num_classes=10))
        >>> disk(torch.randn(4, 10, requires_grad=True), torch.randn(4, 10), torch.tensor([1, 2, 3, 4])).backward()
    """

    multiplier: Tensor
    budget: Tensor
    weight: Tensor | None
    epoch_statistics: Tensor
    epoch_batches: Tensor  # number of all, and of those with a NaN or inf loss
    fitted_student_temperature: Tensor
    student_temperature_moments: Tensor
    student_seen: frozenset[str] = frozenset()  # what an epoch's forwards gave: "trained", "frozen"

    def __init__(
        self,
        guide: nn.Module,
        *,
        ce_weight: float = 0.0,
        distill_weight: float | None = None,
        temperature: float = 2.0,
        student_temperature: float | Literal["fit"] | None = None,
        top_k: int | None = None,
        discount: float | Literal["auto"] | None = "auto",
        multiplier: float | None = None,
        budget: float | None = None,
        variant: str | Variant = "paper",
        guide_gradient_scale: float | None = 0.3,
        ignore_index: int = -100,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if fitted := isinstance(student_temperature, str):
            _checks.choice("student_temperature", student_temperature, ("fit",))
        form = resolve_form(guide, discount, multiplier, budget, variant)
        settings = Settings(
            ce_weight=ce_weight,
            distill_weight=remaining_weight(ce_weight) if distill_weight is None else distill_weight,
            temperature=temperature,
            student_temperature=temperature if isinstance(student_temperature, str | None) else student_temperature,
            top_k=top_k,
            multiplier=form.multiplier,
            budget=form.budget,
            variant=resolve_variant(variant),
            guide_gradient_scale=guide_gradient_scale,
            hold_discount=form.level is not None,
            ignore_index=ignore_index,
            weight=weight,
            label_smoothing=label_smoothing,
        ).checked()
        warn_without_ce(settings)
        self.guide, self.level, self.keeps_multiplier = guide, form.level, form.keeps_multiplier
        self.guide_gradient_scale, self.label_smoothing = settings.guide_gradient_scale, settings.label_smoothing
        self.ce_weight, self.distill_weight, self.temperature = settings[:3]
        self.variant, self.top_k, self.ignore_index = settings.variant, settings.top_k, settings.ignore_index
        self.fit_student_temperature, self.warned = fitted, set[str]()
        # float64, so that a schedule's 0.3 stays 0.3 in a float64 objective
        self._initial: dict[str, Any] = {"multiplier": form.multiplier, "budget": form.budget}
        if fitted:
            self._initial |= {"fitted_student_temperature": self.temperature, "student_temperature_moments": [0.0, 0.0]}
        self.register_buffer("weight", None)
        self._initial |= {} if weight is None else {"weight": weight.tolist()}
        self._initial |= {"epoch_statistics": NOTHING_SEEN, "epoch_batches": (0.0, 0.0)}
        for name, value in self._initial.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64), persistent=name != "epoch_batches")
        self.reduce_mean: Callable[[Tensor], Tensor] | None = None
        self._fixed_student_temperature = student_temperature  # a setting: checkpoints do not override it

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        teacher_features: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the objective (5), a scalar: ``terms(...).loss``."""
        note_student(self, student_logits)
        return self.terms(student_logits, teacher_logits, target, teacher_features, sample_weight=sample_weight).loss

    def terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        teacher_features: Tensor | None = None,
        *,
        guide_logits: Tensor | None = None,
        sample_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> DiSKTerms:
        """Evaluate everything once: the loss, its two halves and what to log, see ``functional.DiSKTerms``.

        In training mode with gradients enabled it updates ``statistics()``, the level of g and a fitted temperature.

        Args:
            student_logits: before softmax.
            teacher_logits: before softmax; no gradient reaches them.
            target: class indices, or probabilities.
            teacher_features: for a guide that reads them.
            guide_logits: of a guide that ran elsewhere, (N,) or (N, d1, ...); ``teacher_features`` are then not read.
            sample_weight: weight per sample or target; means still divide by the number of non-ignored targets.
            reduction: ``"none"`` for values per target, ``"mean"`` for their ``mean()``, ``"sum"`` for their ``sum()``.
        """
        _checks.logits(student_logits, teacher_logits)
        _checks.choice("reduction", reduction, REDUCTIONS)
        if guide_logits is None:
            guide_logits = self.guide_logits(teacher_logits, teacher_features, target=target)
        with without_autocast(student_logits):
            inputs = student_logits, teacher_logits, target, guide_logits, sample_weight
            terms = evaluate_batch(self, *inputs, per_position=reduction != "mean", counted=self.training)
        return terms.sum() if reduction == "sum" else terms

    def guide_logits(
        self, teacher_logits: Tensor, teacher_features: Tensor | None = None, *, target: Tensor | None = None
    ) -> Tensor:
        """Return the guide's own logits, (N,) or (N, d1, ...); the teacher's outputs are detached.

        With a target, the guide's inputs are zeroed where it is ignored, as a NaN there would reach the gradient.
        """
        inputs = [teacher_logits.detach()]
        if teacher_features is not None:
            _checks.tensor("teacher_features", teacher_features)
            inputs.append(teacher_features.detach())
        if target is not None:
            _checks.target(target, teacher_logits)
            inputs = [guide_input(value, target, self.ignore_index) for value in inputs]
        with without_autocast(teacher_logits):
            guide_logits: Tensor = self.guide(*inputs)
        return guide_logits

    @property
    def student_temperature(self) -> float | Tensor:
        """The current student temperature: the constructor's number, or the fitted buffer."""
        if self.fit_student_temperature:
            return self.fitted_student_temperature
        return float(self.temperature if (fixed := self._fixed_student_temperature) is None else fixed)

    def statistics(self) -> EpochStatistics:
        """Return statistics of the training batches since the last reset; synchronizes with the device."""
        return EpochStatistics.read(self.epoch_statistics)

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Reset the statistics."""
        self.epoch_statistics.copy_(no_statistics())
        self.epoch_batches.zero_()

    def _settings(self, *, averaged: bool = True) -> Settings:
        """Return the current hyper-parameters, which the constructor has validated; ``averaged``: over ranks too."""
        named = {name: getattr(self, name) for name in Settings._fields if name != "hold_discount"}
        named["reduce_mean"] = self.reduce_mean if averaged else None
        return Settings(**named, hold_discount=self.level is not None)

    def extra_repr(self) -> str:
        """Show the settings in ``print(loss)``, multiplier and budget with their current values."""
        return format_settings(self, student_temperature=self._fixed_student_temperature)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, converting the statistics of an older checkpoint to the current layout."""
        upgrade(state_dict, f"{prefix}epoch_statistics")  # load_state_dict has copied the caller's dict
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.epoch_batches.is_meta and not self.epoch_statistics.is_meta:  # with assign=True; it is in no state
            self.epoch_batches = self.epoch_statistics.new_zeros(2)

    def _apply(self, fn: Any, recurse: bool = True) -> "DiSKLoss":
        """Move the module; its scalars stay float64 (counts!), and are reinitialized on leaving the meta device."""
        with moving(self, fn, self._initial):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
