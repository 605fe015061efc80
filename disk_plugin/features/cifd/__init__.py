"""CIFD (NeurIPS 2024): distillation through rate-distortion modules and an information bottleneck."""

from .bottleneck import InformationBottleneck
from .embedding_loss import EmbeddingLoss
from .embeddings import Embeddings
from .fitting import fit_rdms
from .method import CIFD
from .modules import RateDistortionModule

__all__ = ["CIFD", "EmbeddingLoss", "Embeddings", "InformationBottleneck", "RateDistortionModule", "fit_rdms"]
