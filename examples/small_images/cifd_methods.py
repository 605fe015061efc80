"""CIFD, alone and guided by DiSK: modules fitted once to the teacher's embeddings, then methods like the others."""

from typing import Any

import torch
from torch import Tensor

from disk_plugin.features import CIFD, Guided, Outputs
from disk_plugin.features.cifd import RateDistortionModule

from .disk_methods import NUM_CLASSES, DiSK
from .method import Batch, Method

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4  # the student's


def groups(cifd: CIFD) -> list[dict[str, Any]]:
    """Return the optimizer's groups: the densities decay towards nothing sensible."""
    density = list(cifd.embeddings.bottleneck.density.parameters())  # in an order that a resumed run repeats
    apart = set(density)
    others = [each for each in cifd.trainable_parameters() if each not in apart]
    return [{"params": others}, {"params": density, "weight_decay": 0.0}]


class CIFDAlone(Method):
    """CIFD, eq. (9).

    Args:
        feature_dim: D of the teacher.
        student_dim: D of the student.
        rdms: fitted modules.
        seed: of KD dropout and of the projector.
        settings: of ``CIFD``.
    """

    searched_as, reads_student, needs = "cifd", True, ("rdms", "student_dim")

    @classmethod
    def made(cls, settings: dict[str, Any], **run: Any) -> "Method":
        """Build it for a run."""
        names = ("feature_dim", "student_dim", "rdms", "seed")
        return cls(settings=settings, **{name: run[name] for name in names})

    def __init__(
        self, *, feature_dim: int, student_dim: int, rdms: RateDistortionModule, seed: int, settings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.settings = settings
        self.cifd = make_cifd(settings, feature_dim, student_dim, rdms, seed)
        self.optimizer = torch.optim.SGD(groups(self.cifd), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def extra_repr(self) -> str:
        """Show the settings, which identify a checkpoint."""
        return str(self.settings)

    def forward(self, student: Outputs, batch: Batch) -> Tensor:
        """Return the sum of the losses' means."""
        losses = self.cifd(student, batch.teacher, batch.labels)
        return torch.stack([loss.mean() for loss in losses.values()]).sum()


class DiSKCIFD(DiSK):
    """CIFD weighted by DiSK's guide, whose own loss takes the place of CIFD's on the logits.

    Args:
        student_dim: D of the student.
        rdms: fitted modules.
        cifd: settings of ``CIFD``.
        weight: of ``Guided``.
        settings: of ``DiSK``.
    """

    searched_as, reads_student, needs = "disk-cifd", True, CIFDAlone.needs

    def __init__(
        self,
        *,
        student_dim: int,
        rdms: RateDistortionModule,
        cifd: dict[str, Any],
        weight: str = "one_minus_guide",
        num_classes: int = NUM_CLASSES,
        **settings: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **settings)
        self.settings |= {"cifd": cifd, "weight": weight}
        method = make_cifd(cifd, settings["feature_dim"], student_dim, rdms, settings["seed"])
        self.guided = Guided(self.disk, method, weight=weight)
        for group in groups(method):
            self.optimizer.add_param_group(group)

    def forward(self, student: Outputs, batch: Batch) -> Tensor:
        """One backward for student, method and guide."""
        terms = self.guided.terms(student, batch.teacher, batch.labels, reduction="none")
        self.report.add(terms)
        return terms.mean().loss


def make_cifd(
    settings: dict[str, Any], feature_dim: int, student_dim: int, rdms: RateDistortionModule, seed: int
) -> CIFD:
    """Build CIFD, its layers from their own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CIFD(student_dim, feature_dim, rdms=rdms, seed=seed, **settings)
