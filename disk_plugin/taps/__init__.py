"""Access to features: of any classifier by hooks, of timm's models by their own methods; tails of teachers."""

from .hooks import FeatureTap, logits_of, with_features
from .tails import TeacherTail, get_tail
from .timm_models import Layout, TeacherHead

__all__ = ["FeatureTap", "Layout", "TeacherHead", "TeacherTail", "get_tail", "logits_of", "with_features"]
