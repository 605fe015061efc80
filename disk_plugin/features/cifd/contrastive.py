"""CIFD for pairs of embeddings such as CLIP's image and text: section 3.3.1 of the paper."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from ... import _checks
from ..._modes import without_autocast
from ...functional._positions import promote
from .dropout import SourceDropout
from .embedding_loss import EmbeddingLoss


class ContrastiveCIFD(nn.Module):
    r"""CIFD for two modalities, without classes (NeurIPS 2024, section 3.3.1): $\lambda_{CL} L_{CL} + L_I + L_L$.

    $L_I$ and $L_L$ are eq. (8) of the image's and the text's embedding, each with modules fitted to the teacher's
    embeddings of its own modality (``fit_rdms`` on ``Embeddings(features)``). $L_{CL}$ is the symmetric InfoNCE of the
    normalised projected embeddings, over the pairs of the batch.

    **This module has parameters**, those of both losses.

    Args:
        image: eq. (8) of the images.
        text: eq. (8) of the texts.
        contrastive_weight: lambda_CL, >= 0.
        dropout: probability of leaving out a teacher, or module, in a batch, for each modality apart.
        seed: of KD dropout.

    Shape:
        embeddings (N, D) of each model and modality, before normalisation; pair i is row i of both. Returns the losses
        ``contrastive``, ``image``, ``text`` and ``rate``, (N,), weighted.

    Raises:
        ValueError: values out of range, other shapes, modules that were not fitted.
        TypeError: losses of another type.

    Examples:
        >>> both = ContrastiveCIFD(EmbeddingLoss(8, 16), EmbeddingLoss(12, 16))
        >>> student, teacher = (torch.randn(4, 8), torch.randn(4, 12)), torch.randn(2, 4, 16)
        >>> losses = both(*student, *teacher)
        >>> torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    """

    def __init__(
        self,
        image: EmbeddingLoss,
        text: EmbeddingLoss,
        *,
        contrastive_weight: float = 0.005,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, loss in {"image": image, "text": text}.items():
            if not isinstance(loss, EmbeddingLoss):
                raise TypeError(f"{name} must be an EmbeddingLoss, got {type(loss).__name__}")
        _checks.number("contrastive_weight", contrastive_weight, at_least=0)
        self.image, self.text, self.contrastive_weight = image, text, float(contrastive_weight)
        self.image_dropout = SourceDropout(image.sources, dropout, seed)
        self.text_dropout = SourceDropout(text.sources, dropout, seed + 1)

    def forward(
        self,
        student_image: Tensor,
        student_text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        logit_scale: float | Tensor = 100.0,
    ) -> dict[str, Tensor]:
        """Return the losses; ``logit_scale`` divides the temperature out: CLIP's ``logit_scale.exp()``."""
        if len(student_image) != len(student_text):
            raise ValueError(f"images and texts must be pairs, got {len(student_image)} and {len(student_text)}")
        images = self.image(self.image.bottleneck(student_image), teacher_image, self.image_dropout())
        texts = self.text(self.text.bottleneck(student_text), teacher_text, self.text_dropout())
        contrastive = info_nce(images.projected, texts.projected, logit_scale)
        return {
            "contrastive": self.contrastive_weight * contrastive,
            "image": images.embedding,
            "text": texts.embedding,
            "rate": images.rate + texts.rate,
        }


def info_nce(image: Tensor, text: Tensor, logit_scale: float | Tensor = 100.0) -> Tensor:
    """Return the symmetric InfoNCE of each pair, (N,), nats, over the pairs of the batch."""
    with without_autocast(image):
        image, text = (normalize(each, dim=1) for each in promote(image, text))
        similarity = logit_scale * image @ text.t()
        own = torch.arange(len(image), device=image.device)
        rows, columns = (cross_entropy(each, own, reduction="none") for each in (similarity, similarity.t()))
        return (rows + columns) / 2
