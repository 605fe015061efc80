"""ScaleKD (Fan et al., NeurIPS 2024): cross-attention projectors, two views of a map, a path through the teacher."""

from .logits import logit_losses
from .loss import ScaleKDLoss
from .method import ScaleKD
from .projector import CrossAttentionProjector
from .views import view_distance, without_dc

__all__ = ["CrossAttentionProjector", "ScaleKD", "ScaleKDLoss", "logit_losses", "view_distance", "without_dc"]
