"""ScaleKD, alone and guided by DiSK: projectors built for the pair, then methods like the others."""

from typing import Any

import torch
from torch import Tensor

from disk_plugin.features import Guided, Outputs, Pair, ScaleKD

from .disk_methods import NUM_CLASSES, DiSK
from .method import Batch, Method
from .views import precision

HEADS = {"proxy_heads": 4, "main_heads": 4}


class ScaleKDAlone(Method):
    """ScaleKD.

    Args:
        pair: student and teacher with their maps.
        seed: of the projectors.
        settings: of ``ScaleKD``.
    """

    searched_as, reads_student, reads_maps, needs = "scalekd", True, True, ("pair",)

    @classmethod
    def made(cls, settings: dict[str, Any], **run: Any) -> "Method":
        """Build it for a run."""
        return cls(settings=settings, pair=run["pair"], seed=run["seed"])

    def __init__(self, *, pair: Pair, seed: int, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.scalekd = make_scalekd(settings, pair, seed)
        self.optimizer = projectors_optimizer(self.scalekd)

    def extra_repr(self) -> str:
        """Show the settings, which identify a checkpoint."""
        return str(self.settings)

    def forward(self, student: Outputs, batch: Batch) -> Tensor:
        """Return the sum of the losses' means."""
        with precision(batch.images.device.type):
            losses = self.scalekd(student, batch.teacher, batch.labels)
        return torch.stack([loss.mean() for loss in losses.values()]).sum()


class DiSKScaleKD(DiSK):
    """ScaleKD weighted by DiSK's guide, whose own loss takes the place of ScaleKD's on the logits.

    Args:
        pair: student and teacher with their maps.
        scalekd: settings of ``ScaleKD``.
        weight: of ``Guided``.
        settings: of ``DiSK``.
    """

    searched_as, reads_student, reads_maps, needs = "disk-scalekd", True, True, ("pair",)

    def __init__(
        self,
        *,
        pair: Pair,
        scalekd: dict[str, Any],
        weight: str = "one_minus_guide",
        num_classes: int = NUM_CLASSES,
        **settings: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **settings)
        self.settings |= {"scalekd": scalekd, "weight": weight}
        method = make_scalekd(scalekd, pair, settings["seed"])
        self.guided = Guided(self.disk, method, weight=weight)
        self.projectors_optimizer = projectors_optimizer(method)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The guide's and the projectors'."""
        return [*super().optimizers, self.projectors_optimizer]

    def forward(self, student: Outputs, batch: Batch) -> Tensor:
        """One backward for student, projectors and guide."""
        with precision(batch.images.device.type):
            terms = self.guided.terms(student, batch.teacher, batch.labels, reduction="none")
        self.report.add(terms)
        return terms.mean().loss


def make_scalekd(settings: dict[str, Any], pair: Pair, seed: int) -> ScaleKD:
    """Build ScaleKD, its projectors from their own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ScaleKD.for_pair(pair, **{**HEADS, **settings})


def projectors_optimizer(scalekd: ScaleKD) -> torch.optim.Optimizer:
    """Return AdamW, as of the paper's runs: the projectors are blocks of a transformer."""
    return torch.optim.AdamW(scalekd.trainable_parameters(), lr=1e-3, weight_decay=0.05)
