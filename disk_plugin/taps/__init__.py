"""Access to features: of any classifier by hooks, of timm's models by their own methods."""

from .hooks import FeatureTap, logits_of, with_features
from .timm_models import Layout, TeacherHead

__all__ = ["FeatureTap", "Layout", "TeacherHead", "logits_of", "with_features"]
