"""The equations of Kag et al. (ICLR 2023) as pure functions: no state, no modules.

(1) ``kd_loss``; (3) ``usage``, ``violation``, ``budget_loss``; (4) ``scaffolded_kl``,
``scaffold_mask``, ``discount``, ``fit_student_temperature``, ``student_temperature_step``;
(5) ``disk_loss``, ``disk_terms``; the per-sample optimum of (5): ``optimal_guide``,
``optimal_multiplier``. ``reference_terms`` is (5) in plain autograd: to read, to fork, for double backward.
"""

from .budget import budget_loss, usage, violation
from .kd import kd_loss
from .objective import disk_loss, disk_terms
from .oracle import optimal_guide, optimal_multiplier
from .reference import reference_terms
from .scaffold import discount, scaffold_mask, scaffolded_kl
from .temperature import fit_student_temperature, student_temperature_step
from .terms import DiSKTerms

__all__ = [
    "DiSKTerms",
    "budget_loss",
    "discount",
    "disk_loss",
    "disk_terms",
    "fit_student_temperature",
    "kd_loss",
    "optimal_guide",
    "optimal_multiplier",
    "reference_terms",
    "scaffold_mask",
    "scaffolded_kl",
    "student_temperature_step",
    "usage",
    "violation",
]
