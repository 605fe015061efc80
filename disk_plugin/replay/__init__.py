"""Algorithm 1 without its extra passes: the guide is trained on records of the student's passes."""

from .guide_replay import GuideReplay
from .reservoir import Reservoir

__all__ = ["GuideReplay", "Reservoir"]
