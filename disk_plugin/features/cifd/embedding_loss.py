"""CIFD's loss on embeddings, eq. (8): distances to the teacher's and its modules' embeddings, and the rate."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ... import _checks
from ..._modes import without_autocast
from ...functional._positions import promote
from .bottleneck import InformationBottleneck
from .distances import DISTORTIONS, distortion
from .modules import ModuleOutputs, RateDistortionModule


class EmbeddingTerms(NamedTuple):
    """Losses per sample (N,), weighted, and what they were made of.

    Attributes:
        embedding: embedding_weight times the distances to the sources that stay.
        rate: rate_weight times the rate, nats.
        projected: the student's embedding in the teacher's width, (N, D).
        rdms: the modules' outputs; None without modules.
    """

    embedding: Tensor
    rate: Tensor
    projected: Tensor
    rdms: ModuleOutputs | None


class EmbeddingLoss(nn.Module):
    r"""Eq. (8) of CIFD (NeurIPS 2024), per sample.

    $$w_e\Big[m_0\,d(\hat U, X) + \sum_n m_n \lambda_n\,d(\hat U, \hat X_n)\Big] - \lambda_I \log r(\hat W)$$

    Here $X$ is the teacher's embedding, $\hat X_n$ the reconstruction by module n, $\hat W$ the student's noisy
    features, $\hat U$ their projection and $m$ the mask of KD dropout.

    **This module has parameters**, the bottleneck's and the projector's. The modules are frozen and stay in evaluation
    mode.

    Args:
        student_dim: width of the student's features.
        teacher_dim: width of the teacher's.
        rdms: fitted rate-distortion modules; None for the teacher alone.
        rdm_weights: lambda_n of each module, or one number for all.
        embedding_weight: w_e, >= 0; the paper's is 100.
        distortion: d: ``"mse"`` or ``"smooth_l1"``, its mean over the width.
        rate_weight: lambda_I, >= 0.
        gain: see ``InformationBottleneck``.
        projector: a Linear layer where the widths differ; False for none.
        allow_unfitted: use modules that were not fitted, as to measure a step.

    Raises:
        ValueError: values out of range; another number of weights than of modules; modules for another width, or not
            fitted; widths that differ without a projector.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        rdms: RateDistortionModule | None = None,
        *,
        rdm_weights: float | Sequence[float] = 1.0,
        embedding_weight: float = 1.0,
        distortion: str = "smooth_l1",
        rate_weight: float = 0.005,
        gain: float = 1.0,
        projector: bool = True,
        allow_unfitted: bool = False,
    ) -> None:
        super().__init__()
        _checks.integer("teacher_dim", teacher_dim, at_least=1)
        for name, value in {"embedding_weight": embedding_weight, "rate_weight": rate_weight}.items():
            _checks.number(name, value, at_least=0)
        _checks.choice("distortion", distortion, DISTORTIONS)
        if rdms is not None and not isinstance(rdms, RateDistortionModule):
            raise TypeError(f"rdms must be a RateDistortionModule, got {type(rdms).__name__}")
        if rdms is not None and rdms.dim != teacher_dim:
            raise ValueError(f"rdms must be for the teacher's width {teacher_dim}, got some for {rdms.dim}")
        if student_dim != teacher_dim and not projector:
            raise ValueError(
                f"student and teacher must have embeddings of the same width without a projector, got {student_dim} "
                f"and {teacher_dim}: set projector=True"
            )
        self.bottleneck = InformationBottleneck(student_dim, gain=gain)
        self.projector = nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim)
        self.rdms = None if rdms is None else rdms.requires_grad_(False).eval()
        self.rdm_weights = _per_module(rdm_weights, 0 if rdms is None else len(rdms))
        self.embedding_weight, self.rate_weight = float(embedding_weight), float(rate_weight)
        self.distortion, self.allow_unfitted = distortion, bool(allow_unfitted)

    @property
    def sources(self) -> int:
        """Number of teachers: the teacher itself and its modules."""
        return 1 + len(self.rdm_weights)

    def forward(self, noisy: Tensor, teacher_features: Tensor, keep: Tensor | None = None) -> EmbeddingTerms:
        """Evaluate it for what ``bottleneck`` returned; ``keep`` (sources,) is the mask of KD dropout."""
        self._check(noisy, teacher_features)
        with without_autocast(noisy):
            noisy, wanted = promote(noisy, teacher_features.detach())
            projected = self._projected(noisy)
            weights = noisy.new_tensor([1.0, *self.rdm_weights])
            if keep is not None:
                weights = weights * keep.to(noisy.dtype)
            # a row that is not finite has loss NaN but no gradient: 0 times NaN would be NaN
            finite = wanted.isfinite().all(1)
            wanted = torch.where(finite.unsqueeze(1), wanted, 0.0)
            targets, outputs = wanted.unsqueeze(0), None
            if self.rdms is not None:
                with torch.no_grad():
                    outputs = self.rdms(wanted)
                targets = torch.cat([targets, outputs.reconstruction])
            each = distortion(projected, targets, self.distortion)
            embedding = torch.where(finite, self.embedding_weight * (weights @ each), torch.nan)
            rate = self.rate_weight * self.bottleneck.rate(noisy)
        return EmbeddingTerms(embedding, rate, projected, outputs)

    def _projected(self, noisy: Tensor) -> Tensor:
        """Apply the projector in the features' precision, whatever its own."""
        if not isinstance(self.projector, nn.Linear):
            return noisy
        return linear(noisy, self.projector.weight.to(noisy.dtype), self.projector.bias.to(noisy.dtype))

    def train(self, mode: bool = True) -> "EmbeddingLoss":
        """Set the mode; the modules stay in evaluation mode, in which they round."""
        super().train(mode)
        if self.rdms is not None:
            self.rdms.eval()
        return self

    def _check(self, noisy: Tensor, teacher_features: Tensor) -> None:
        if self.rdms is not None and not self.rdms.fitted and not self.allow_unfitted:
            raise ValueError(
                "the rate-distortion modules must be fitted before the student's training, got new ones: call "
                "fit_rdms(...), or set allow_unfitted=True"
            )
        width = self.projector.out_features if isinstance(self.projector, nn.Linear) else self.bottleneck.dim
        if tuple(teacher_features.shape) != (len(noisy), width):
            raise ValueError(
                f"the teacher's features must have shape {(len(noisy), width)}, got {tuple(teacher_features.shape)}"
            )


def _per_module(weights: float | Sequence[float], count: int) -> list[float]:
    """Return a weight per module.

    Raises:
        ValueError: another number of weights, negative ones.
    """
    given = [weights] * count if isinstance(weights, int | float) else list(weights)
    if len(given) == 1:
        given *= count
    if len(given) != count:
        raise ValueError(f"rdm_weights must hold a weight for each of the {count} modules, got {len(given)}")
    for weight in given:
        _checks.number("rdm_weights", weight, at_least=0)
    return [float(weight) for weight in given]
