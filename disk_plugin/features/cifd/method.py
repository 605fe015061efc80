"""CIFD (NeurIPS 2024) as a method: the losses of eq. (9), per sample."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ... import _checks
from ..._progress import progress_bar
from ...functional._positions import promote, without_ignored
from ..method import Method, Outputs, Pair, check_head
from .distances import REDUCTIONS, divergence
from .dropout import SourceDropout
from .embedding_loss import EmbeddingLoss
from .embeddings import collected
from .fitting import fit_rdms
from .modules import ModuleOutputs, RateDistortionModule

_DEFAULT_R = (1e4, 5e3, 1e3)  # ImageNet, appendix A.2


class CIFD(Method):
    r"""CIFD: the student imitates the teacher and copies of it with less information (NeurIPS 2024), eq. (9).

    $$\lambda_{CE}\,CE + \lambda_{KL}\tau^2\Big[m_0 KL(V_T\|V_S) + \sum_n m_n\lambda_n KL(V_n\|V_S)\Big]
    + w_e\Big[m_0\,d(\hat U, X) + \sum_n m_n\lambda_n\,d(\hat U, \hat X_n)\Big] - \lambda_I \log r(\hat W)$$

    The copies are rate-distortion modules on the teacher's embedding, fitted before the student's training: by
    ``fit_rdms``, or by a launcher. An information bottleneck adds noise between the student's features and its
    classifier in training. At inference nothing remains but the student.

    **This module has parameters**, the bottleneck's density and the projector: give ``trainable_parameters()`` to an
    optimizer.

    Args:
        student_dim: width of the student's features.
        teacher_dim: width of the teacher's.
        num_classes: C, for new modules, which imitate the teacher's classes.
        rdms: fitted modules; None for new ones, one per ``distortion_weights``.
        ce_weight: lambda_CE, >= 0; without effect where DiSK's own loss takes its place.
        kl_weight: lambda_KL, >= 0.
        temperature: tau, > 0.
        embedding_weight: w_e, weight of the distances between embeddings, >= 0; the paper's is 100.
        distortion: distance between embeddings, "mse" or "smooth_l1", of modules and student.
        rate_weight: lambda_I, weight of the rate of the student's features, >= 0.
        rdm_weights: lambda_n of each module, or one for all, >= 0.
        dropout: probability of leaving out a teacher, or module, in a batch (KD dropout). DiSK's loss on the logits,
            which takes the place of ``kl`` where this is guided, is never left out.
        gain: the bottleneck's noise has width 1 / gain, in units of the student's features.
        projector: a Linear layer from the student's features to the teacher's width, where they differ.
        distortion_weights: R of each new module: the weight of the distortion against the rate. None at all for no
            modules.
        reduction: of the distortion in fitting: "sum" for the paper's R near 1, "mean" for those from 1000 on.
        rdms_file: file of fitted modules, by ``RateDistortionModule.save``; empty to fit new ones.
        rdm_epochs: passes over the teacher's embeddings in fitting.
        seed: of KD dropout and of fitting.
        allow_unfitted: train with modules that were not fitted, as to time a step.

    Shape:
        logits (N, C), features (N, D); target class indices (N,) or probabilities (N, C). Returns the losses ``ce``,
        ``kl``, ``kl_rdms``, ``embedding`` and ``rate``, (N,), weighted, 0 for class indices outside 0 to C - 1.

    Raises:
        ValueError: values out of range; other widths or classes; modules that were not fitted; in training mode, a
            student without ``Outputs.head``.
        TypeError: values of another type.

    Examples:
        >>> cifd = CIFD(16, 32, rdms=None, distortion_weights=())
        >>> head = torch.nn.Linear(16, 10)
        >>> features = torch.rand(4, 16)
        >>> student = Outputs(head(features), features, head=head)
        >>> losses = cifd(student, Outputs(torch.randn(4, 10), torch.rand(4, 32)), torch.arange(4))
        >>> sorted(losses)
        ['ce', 'embedding', 'kl', 'rate']
    """

    reads = frozenset({"features", "head"})
    unguided = frozenset({"ce", "kl", "rate"})
    scaffolded = frozenset({"ce", "kl"})
    shape_settings = ("distortion_weights", "projector")

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_classes: int = 0,
        rdms: RateDistortionModule | None = None,
        *,
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        temperature: float = 2.0,
        embedding_weight: float = 1.0,
        distortion: str = "smooth_l1",
        rate_weight: float = 0.005,
        rdm_weights: float | Sequence[float] = (1.0,),
        dropout: float = 0.25,
        gain: float = 1.0,
        projector: bool = True,
        distortion_weights: Sequence[float] = _DEFAULT_R,
        reduction: str = "mean",
        rdms_file: str | os.PathLike[str] = "",
        rdm_epochs: int = 30,
        seed: int = 0,
        allow_unfitted: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"ce_weight": ce_weight, "kl_weight": kl_weight}.items():
            _checks.number(name, value, at_least=0)
        _checks.number("temperature", temperature, above=0)
        _checks.choice("reduction", reduction, REDUCTIONS)
        _checks.integer("rdm_epochs", rdm_epochs, at_least=1)
        if rdms is None and rdms_file:
            rdms = RateDistortionModule.load(rdms_file)
        if rdms is None and (not isinstance(distortion_weights, Sequence) or len(distortion_weights)):
            rdms = RateDistortionModule(teacher_dim, num_classes, distortion_weights=distortion_weights)
        loss: dict[str, Any] = {"embedding_weight": embedding_weight, "distortion": distortion, "gain": gain}
        loss |= {"rate_weight": rate_weight, "projector": projector, "allow_unfitted": allow_unfitted}
        self.embeddings = EmbeddingLoss(student_dim, teacher_dim, rdms, rdm_weights=rdm_weights, **loss)
        self.dropout = SourceDropout(self.embeddings.sources, dropout, seed)
        self.ce_weight, self.kl_weight, self.temperature = float(ce_weight), float(kl_weight), float(temperature)
        self.fitting: dict[str, Any] = {"distortion": distortion, "reduction": reduction, "temperature": temperature}
        self.fitting |= {"epochs": rdm_epochs, "seed": seed}

    @classmethod
    def for_pair(cls, pair: Pair, **settings: Any) -> "CIFD":
        """Build the method for the pair's features, with new modules unless ``rdms_file`` names some.

        Raises:
            ValueError: features of another shape; a student whose last Linear does not make its logits.
        """
        student, teacher = pair.student, pair.teacher
        for side, outputs in (("student", student), ("teacher", teacher)):
            shape = tuple(given(outputs.features).shape)
            if len(shape) != 2:
                raise ValueError(f"CIFD needs features (N, D) of the {side}, got {shape}")
        seen, embeddings = given(student.features), given(teacher.features)
        check_head(student)
        rdms, weights = None, settings.get("distortion_weights", _DEFAULT_R)
        classes, width = teacher.logits.shape[1], embeddings.shape[1]
        if len(weights) and not settings.get("rdms_file"):
            relu = bool((embeddings >= 0).all())
            rdms = RateDistortionModule(width, classes, distortion_weights=weights, nonnegative=relu)
        built = cls(seen.shape[1], width, classes, rdms, **settings)
        found = built.embeddings.rdms
        if found is not None and found.num_classes != classes:
            raise ValueError(
                f"rdms_file must hold modules for the teacher's {classes} classes, got some for {found.num_classes}"
            )
        return built

    @property
    def prepared(self) -> bool:  # type: ignore[override]
        """Whether there are no modules left to fit."""
        rdms = self.embeddings.rdms
        return rdms is None or rdms.fitted or self.embeddings.allow_unfitted

    def prepare(
        self,
        batches: Iterable[tuple[Outputs, Tensor]],
        *,
        folder: Path | None = None,
        shared: bool = False,
        progress: bool = True,
    ) -> str:
        """Fit the modules to the teacher's outputs (stage A), save them as rdms.pt; return their table."""
        rdms = self.embeddings.rdms
        if rdms is None:
            return ""
        shown = progress_bar(batches, progress, "teacher outputs")
        parts = ((given(outputs.features), outputs.logits, target) for outputs, target in shown)
        device = next(rdms.parameters()).device
        fit_rdms(collected(parts), modules=rdms, device=device, shared=shared, progress=progress, **self.fitting)
        if folder is not None:
            rdms.save(folder / "rdms.pt")
        return rdms.table()

    def frozen_modules(self) -> list[nn.Module]:
        """Return the rate-distortion modules."""
        return [] if self.embeddings.rdms is None else [self.embeddings.rdms]

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Return the losses per sample, multiplied by their weights."""
        return self.evaluate(student, teacher, target)[1]

    def evaluate(self, student: Outputs, teacher: Outputs, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits of the noisy features, in training mode, and the losses."""
        logits, noisy = self._noisy(student)
        if logits.ndim != 2:
            raise ValueError(f"CIFD needs logits (N, C), one prediction per sample, got shape {tuple(logits.shape)}")
        _checks.logits(logits, teacher.logits)
        _checks.target(target, logits)
        keep = self.dropout()
        terms = self.embeddings(noisy, given(teacher.features), keep)
        losses = self._on_logits(logits, teacher.logits, terms.rdms, target, keep)
        losses = {**losses, "embedding": terms.embedding, "rate": terms.rate}  # dynamo of torch 2.4 traces no |=
        if target.is_floating_point():
            return logits, losses
        counts = (target >= 0) & (target < logits.shape[1])
        return logits, {name: torch.where(counts, loss, 0.0) for name, loss in losses.items()}

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"ce_weight={self.ce_weight}, kl_weight={self.kl_weight}, temperature={self.temperature}"

    def _noisy(self, student: Outputs) -> tuple[Tensor, Tensor]:
        """Return logits and features after the bottleneck; without noise, the logits are the student's own."""
        features = given(student.features)
        noisy = self.embeddings.bottleneck(features)
        if noisy is features:
            return student.logits, noisy
        if student.head is None:
            raise ValueError(
                "CIFD needs Outputs.head of the student in training, a function from features to logits such as its "
                "last Linear, got None: the noise is between the two"
            )
        return student.head(noisy.to(features.dtype)), noisy

    def _on_logits(
        self, student: Tensor, teacher: Tensor, rdms: ModuleOutputs | None, target: Tensor, keep: Tensor
    ) -> dict[str, Tensor]:
        s, t = promote(student, teacher.detach())
        label = target
        if not target.is_floating_point():
            counts = (target >= 0) & (target < s.shape[1])
            label, s, t = torch.where(counts, target, 0), without_ignored(s, counts), without_ignored(t, counts)
        keep = keep.to(s.dtype)
        ce = cross_entropy(s, label.to(s.dtype) if target.is_floating_point() else label, reduction="none")
        losses = {"ce": self.ce_weight * ce}
        losses["kl"] = self.kl_weight * keep[0] * divergence(s, t, self.temperature)
        if rdms is not None:
            classes = 0 if rdms.logits is None else rdms.logits.shape[2]
            if rdms.logits is None or classes != s.shape[1]:
                raise ValueError(f"the rdms must be for the logits' {s.shape[1]} classes, got some for {classes}")
            weights = keep[1:] * s.new_tensor(self.embeddings.rdm_weights)
            each = divergence(s, rdms.logits.to(s.dtype), self.temperature)
            losses["kl_rdms"] = self.kl_weight * (weights.unsqueeze(1) * each).sum(0)  # no product for autocast
        return losses


def given(features: Tensor | None) -> Tensor:
    """Return the features; ValueError if the host did not give any."""
    if features is None:
        raise ValueError("CIFD needs Outputs.features, what a model's last Linear reads, got None")
    return features
