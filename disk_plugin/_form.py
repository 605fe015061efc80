"""How a loss bounds g: by a target of the mean discount, or by the paper's budget in nats and its multiplier."""

import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from . import _checks
from .level import DiscountLevel, GuideLevel, to_shown
from .variants import Variant, resolve_variant

if TYPE_CHECKING:
    from .loss import DiSKLoss

MULTIPLIER, BUDGET = 50.0, 0.3  # defaults with a budget; 50 is the largest multiplier of A.5
PAPER_BOUNDS = (0.1, 50.0)  # smallest and largest multiplier of a schedule, A.5
_BUDGET_RULES = ("budget_label", "budget_clamp", "budget_denominator", "guide_penalty", "student_feels_budget")


class Form(NamedTuple):
    """The arguments of ``DiSKLoss`` that bound g, resolved together."""

    level: GuideLevel | None  # holds the discount; None with a budget
    multiplier: float
    budget: float
    keeps_multiplier: bool  # a scheduler leaves the multiplier constant unless bounds are given


def resolve_form(
    guide: nn.Module,
    discount: float | Literal["auto"] | None,
    multiplier: Any,
    budget: Any,
    variant: str | Variant = "paper",
) -> Form:
    """Resolve ``DiSKLoss``'s arguments; defaults depend on which of them are given.

    A variant with rules of its own for the budget, as the authors' scripts have them, asks for a budget too.

    Raises:
        ValueError: a numeric discount beside a budget, a multiplier or a guide with its own; a budget beside a guide
            that has no use for it; values out of range.
        TypeError: ``guide`` is not a module; values of another type.
    """
    if not isinstance(guide, nn.Module):
        raise TypeError(f"guide must be a Module such as GuideHead(num_classes), got {type(guide).__name__}")
    if not isinstance(discount, str) and discount is not None:
        _checks.number("discount", discount, at_least=0, at_most=0.99)
        for name, value in {"multiplier": multiplier, "budget": budget}.items():
            if value is not None:
                raise ValueError(f"discount={discount} and {name}={value} both bound g: expected one of them")
        if isinstance(guide, DiscountLevel):
            raise ValueError(
                f"discount must be left out beside a {type(guide).__name__}, which has its own; got {discount}"
            )
    elif discount is not None:
        _checks.choice("discount", discount, ("auto",))
    by_itself = isinstance(guide, DiscountLevel)
    rules, papers = resolve_variant(variant), Variant()
    ruled = isinstance(discount, str) and any(getattr(rules, name) != getattr(papers, name) for name in _BUDGET_RULES)
    asked = multiplier is not None or budget is not None or ruled
    level = None if by_itself or asked or discount is None else GuideLevel(discount)
    default = 0.0 if by_itself or level else MULTIPLIER
    values = {
        "multiplier": default if multiplier is None else multiplier,
        "budget": BUDGET if budget is None else budget,
    }
    for name, value in values.items():
        _checks.number(name, value, at_least=0)
    if _sets_g(guide, rules):
        for name, value in {"budget": budget, "multiplier": multiplier or None}.items():
            if value is not None:
                raise ValueError(
                    f"{name} must be left out beside a {type(guide).__name__}, which sets g; got {value:g}"
                )
    keeps = multiplier is not None or default == 0.0
    return Form(level, float(values["multiplier"]), float(values["budget"]), keeps)


def has_budget(loss: "DiSKLoss") -> bool:
    """Return whether a budget bounds the loss's g."""
    return loss.level is None and not _sets_g(loss.guide, loss.variant)


def _sets_g(guide: nn.Module, rules: Variant) -> bool:
    """Return whether the guide sets g by itself, so that a budget's hinge has nothing to train."""
    return isinstance(guide, DiscountLevel) and not rules.student_feels_budget


def level_of(loss: "DiSKLoss") -> DiscountLevel | None:
    """Return what sets the level of g in a loss without a budget: its own, or a ``UniformGuide``."""
    level = loss.level or loss.guide
    return level if isinstance(level, DiscountLevel) else None


def target_of(loss: "DiSKLoss") -> dict[str, float]:
    """Return what to log of the discount: its current target by name, or nothing if no target sets g."""
    level = level_of(loss)
    return {} if level is None or level.discount is None else {"discount_target": level.target.item()}


def remaining_weight(ce_weight: Any) -> float:
    """Return the default weight of the divergence, 1 - ``ce_weight``, at least 0.

    Raises:
        ValueError: ``ce_weight`` < 0.
        TypeError: not a number.
    """
    _checks.number("ce_weight", ce_weight, at_least=0)
    return max(1.0 - float(ce_weight), 0.0)


def format_settings(loss: "DiSKLoss", **more: Any) -> str:
    """Return a loss's settings as ``repr`` shows them, with the current multiplier and budget if they bound g."""
    names = ["ce_weight", "distill_weight", "temperature", "top_k", "guide_gradient_scale", "ignore_index"]
    shown = {**{name: getattr(loss, name) for name in names}, **more}
    if has_budget(loss):  # else level or guide show what sets g
        shown |= {"multiplier": to_shown(loss.multiplier), "budget": to_shown(loss.budget)}
    if loss.label_smoothing:
        shown["label_smoothing"] = loss.label_smoothing
    return ", ".join(f"{name}={value!r}" for name, value in shown.items()) + f", {loss.variant}"


def asks_for_budget(loss: "DiSKLoss", rule: str, **given: Any) -> bool:
    """Return whether a scheduler's arguments are those of a budget.

    Raises:
        ValueError: they are, but the loss was given a number as its discount, or its guide has no use for a budget.
    """
    asked = [name for name, value in given.items() if value is not None] + ["rule"] * (rule != "cosine")
    if asked and _sets_g(loss.guide, loss.variant):
        raise ValueError(
            f"{' and '.join(asked)} must be left out beside a {type(loss.guide).__name__}, which sets g by its "
            f"{'value' if loss.guide.discount is None else 'discount'}"
        )
    if asked and loss.level is not None and loss.level.discount != "auto":
        raise ValueError(
            f"the loss was given discount={loss.level.discount}, which has no {' and '.join(asked)}: build it with "
            f"budget=... or discount=None, or leave these out"
        )
    return bool(asked)


def switch_to_budget(loss: "DiSKLoss") -> None:
    """Switch the loss from the discount to a budget, as if it had been built with one."""
    del loss.level  # else it stays registered, as None
    loss.level, loss.keeps_multiplier = None, False
    loss._initial["multiplier"] = MULTIPLIER


def multiplier_bounds(loss: "DiSKLoss", multiplier: Any, *, scheduled: bool) -> tuple[float, float]:
    """Return the loss's multiplier twice if it stays constant, else the bounds given, or the paper's."""
    own, keeps = loss.multiplier.item(), loss.keeps_multiplier
    if multiplier is None and keeps and not scheduled:
        return own, own
    bounds = PAPER_BOUNDS if multiplier is None else pair("multiplier", multiplier)
    given = own > 0 or level_of(loss) is None  # beside a discount it is 0, unasked
    if keeps and given and bounds != (own, own):
        warnings.warn(
            f"the loss was given multiplier={own:g}, which the schedule's bounds {bounds} overwrite: give one of them",
            stacklevel=3,  # the line that constructs the scheduler
        )
    return bounds


def pair(name: str, values: Any) -> tuple[float, float]:
    """Validate two numbers >= 0 and return them as floats."""
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise ValueError(f"{name} must be two numbers, got {values!r}")
    for value in values:
        _checks.number(name, value, at_least=0)
    return float(values[0]), float(values[1])
