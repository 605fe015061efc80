"""Algorithm 1 without its extra passes over the data: the guide trains on a record of the student's passes."""

from .guide_replay import GuideReplay
from .reservoir import Reservoir

__all__ = ["GuideReplay", "Reservoir"]
