"""What a model shows beside its logits: of any classifier by hooks, of timm's families by their own methods."""

from .hooks import FeatureTap, logits_of, with_features
from .timm_models import Layout, TeacherHead

__all__ = ["FeatureTap", "Layout", "TeacherHead", "logits_of", "with_features"]
