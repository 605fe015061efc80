"""An epoch of guided training, the same for every host: passes, schedule, record, report, state."""

from .guide_passes import GuidePasses, guide_pass, repeated
from .guided_training import GuidedTraining
from .recipe import Recipe
from .schedule import Schedule

__all__ = ["GuidePasses", "GuidedTraining", "Recipe", "Schedule", "guide_pass", "repeated"]
