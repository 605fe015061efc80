"""Access to features and maps: of any classifier by hooks, of timm's by their own methods; tails of teachers."""

from .hooks import FeatureTap, logits_of, with_features
from .maps import MapTap, with_maps
from .tails import TeacherTail, get_tail
from .timm_models import Layout, TeacherHead

__all__ = [
    "FeatureTap",
    "Layout",
    "MapTap",
    "TeacherHead",
    "TeacherTail",
    "get_tail",
    "logits_of",
    "with_features",
    "with_maps",
]
