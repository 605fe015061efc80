"""Where the authors' two public scripts differ from the paper: one record per variant."""

from typing import Literal, NamedTuple


class Variant(NamedTuple):
    """The choices in which the paper and the authors' CIFAR and ImageNet scripts differ.

    Defaults are the paper's. ``VARIANTS["paper"]._replace(teacher_target="scaffolded")`` changes one choice for an
    ablation.

    Attributes:
        scaffold_label: whether the label's class receives g even outside the teacher's top-K.
        teacher_target: ``"all"``: softmax over all classes. ``"scaffolded"``: the classes outside the scaffold enter
            the softmax at the row's smallest (undivided) logit and are then set to zero, without renormalising.
        budget_label: class of the budget's cross-entropy, the true ``"label"`` or the ``"teacher"``'s argmax.
        budget_clamp: upper bound of that cross-entropy, nats; ``None`` for none.
        budget_denominator: ``"samples"`` or ``"errors"``, the number of samples the student misclassifies (at least 1;
            the authors divide by zero on a batch without errors).
        guide_penalty: weight of an extra term, the mean of log(1 + K g).
        student_feels_budget: whether the budget's gradient reaches the student.
    """

    scaffold_label: bool = False
    teacher_target: Literal["all", "scaffolded"] = "all"
    budget_label: Literal["label", "teacher"] = "label"
    budget_clamp: float | None = None
    budget_denominator: Literal["samples", "errors"] = "samples"
    guide_penalty: float = 0.0
    student_feels_budget: bool = False


_OFFICIAL = Variant(
    scaffold_label=True, teacher_target="scaffolded", budget_label="teacher", budget_denominator="errors"
)

VARIANTS: dict[str, Variant] = {
    "paper": Variant(),
    "official_cifar": _OFFICIAL._replace(budget_clamp=5.0, guide_penalty=0.9),
    "official_imagenet": _OFFICIAL._replace(budget_clamp=2.0, student_feels_budget=True),
}


_CHOICES = {
    "teacher_target": ("all", "scaffolded"),
    "budget_label": ("label", "teacher"),
    "budget_denominator": ("samples", "errors"),
}


def resolve_variant(variant: str | Variant) -> Variant:
    """Return the record of a name, or the record itself after validating its choices.

    Raises:
        ValueError: an unknown name or choice.
    """
    if isinstance(variant, Variant):
        for field, known in _CHOICES.items():
            if getattr(variant, field) not in known:
                raise ValueError(f"variant.{field} must be one of {list(known)}, got {getattr(variant, field)!r}")
        return variant
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"variant must be one of {sorted(VARIANTS)} or a Variant, got {variant!r}")
    return VARIANTS[variant]
