"""CIFD (NeurIPS 2024): distillation through rate-distortion modules and an information bottleneck."""

from . import presets
from .bottleneck import InformationBottleneck
from .contrastive import ContrastiveCIFD
from .embedding_loss import EmbeddingLoss
from .embeddings import Embeddings
from .fitting import fit_rdms
from .method import CIFD
from .modules import RateDistortionModule

__all__ = [
    "CIFD",
    "ContrastiveCIFD",
    "EmbeddingLoss",
    "Embeddings",
    "InformationBottleneck",
    "RateDistortionModule",
    "fit_rdms",
    "presets",
]
