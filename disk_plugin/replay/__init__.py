"""Algorithm 1 without its extra passes: the guide is trained on what the student's passes recorded."""

from .guide_replay import GuideReplay
from .reservoir import Reservoir

__all__ = ["GuideReplay", "Reservoir"]
