"""What a student learns by on the GPU: the one place that knows the package's settings.

A method makes its loss and its own update from tensors on the device and waits for no number, so that a step can be
recorded as a CUDA graph; what needs numbers is left for the end of an epoch.
"""

from functools import cached_property
from typing import Any

import torch
from small_images.methods import Batch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional, presets
from disk_plugin.uniform import UniformGuide

from .sgd import SGD

NUM_CLASSES = 100
GUIDE_PASSES = 3  # of Algorithm 1, before as many passes of the student

# name -> (kind, settings): KD and both forms of DiSK at the same two temperatures, KD also at the field's usual one,
# and nothing else chosen
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ce": ("ce", {}),
    "kd-1": ("kd", {"temperature": 1.0, "ce_weight": 0.0, "distill_weight": 1.0}),
    "disk-1": ("disk", {"temperature": 1.0}),
    "uniform-1": ("uniform", {"temperature": 1.0, "ce_weight": 0.0, "distill_weight": 1.0}),
    "kd-2": ("kd", {"temperature": 2.0, "ce_weight": 0.1, "distill_weight": 0.9}),
    "disk-2": ("disk", {"temperature": 2.0}),
    "uniform-2": ("uniform", {"temperature": 2.0, "ce_weight": 0.0, "distill_weight": 1.0}),
    "kd-4": ("kd", {"temperature": 4.0, "ce_weight": 0.1, "distill_weight": 0.9}),
    "paper": ("paper", presets.PAPER["loss"]),
}
REFERENCE = "kd"  # what the others are compared with: the better of this kind


class Method(nn.Module):
    """A loss of one student; the parameters it has are trained beside the student, by an SGD of their own."""

    guide_passes = 0  # how many follow every as many epochs

    @cached_property
    def sgd(self) -> SGD:
        """The optimizer, made when first asked for: on the device by then."""
        return SGD(self.parameters())

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Return the scalar that student and method descend."""
        raise NotImplementedError

    def trained(self) -> list[Tensor]:
        """What the backward of a student's step reaches beside the student."""
        return self.sgd.parameters

    def end_epoch(self) -> dict[str, float]:
        """Close an epoch; return what to log of it."""
        return {}

    def end_guide_passes(self) -> None:
        """Close the guide's own passes."""

    def progress(self) -> dict[str, Any]:
        """Return what is no tensor of the module, to save."""
        return {}

    def set_progress(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`progress` returned."""


class CE(Method):
    """Cross-entropy alone."""

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Ignore the teacher."""
        return F.cross_entropy(student_logits, batch.labels)


class KD(Method):
    """Plain distillation."""

    def __init__(self, **settings: float) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Weigh cross-entropy and divergence."""
        return functional.kd_loss(student_logits, batch.teacher_logits, batch.labels, **self.settings)


class DiSK(Method):
    """README's loop: loss and scheduler with their defaults, or a loss with another guide."""

    step_every = 1

    def __init__(self, guide: nn.Module, epochs: int, **settings: Any) -> None:
        super().__init__()
        self.disk = DiSKLoss(guide, **settings)
        self.dual = self._scheduler(-(-epochs // self.step_every))
        self.epoch = 0

    def _scheduler(self, steps: int) -> DualScheduler:
        return DualScheduler(self.disk, epochs=steps)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Train student and guide in one step."""
        return self.disk(student_logits, batch.teacher_logits, batch.labels, batch.teacher_features)

    def end_epoch(self) -> dict[str, float]:
        """Step the schedule where it is due."""
        seen = self.disk.statistics()
        log = {"usage": seen.usage, "discount": seen.discount, "guide_std": seen.guide_std}
        log |= {"guide_min": seen.guide_min, "guide_max": seen.guide_max}
        self.epoch += 1
        if self.epoch % self.step_every == 0:
            self.dual.step()
        else:
            self.disk.reset_statistics()
        return log

    def progress(self) -> dict[str, Any]:
        """Return the schedule's."""
        return {"epoch": self.epoch, "dual": self.dual.state_dict()}

    def set_progress(self, state: dict[str, Any]) -> None:
        """Take it up."""
        self.epoch = state["epoch"]
        self.dual.load_state_dict(state["dual"])


class Paper(DiSK):
    """Algorithm 1 in the paper's settings; the guide's three passes read the student's logits of the pass before.

    They follow the first and then every third pass of the student. The record is not ``GuideReplay``'s, which counts
    rows on the host and so cannot be part of a CUDA graph.
    """

    guide_passes = step_every = GUIDE_PASSES

    def __init__(self, guide: nn.Module, epochs: int, samples: int, **settings: Any) -> None:
        super().__init__(guide, epochs, **settings)
        self.samples = samples
        self.seen: Tensor | None = None  # student's logits by position; of one pass, so no state

    def _scheduler(self, steps: int) -> DualScheduler:
        # the paper's 50 of 200 outer iterations, as a share
        return DualScheduler(self.disk, epochs=steps, multiplier=presets.PAPER["dual"]["multiplier"])

    def trained(self) -> list[Tensor]:
        """Nothing: the guide has passes of its own."""
        return []

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Train the student alone and note its logits."""
        if self.seen is None:
            self.seen = student_logits.new_zeros(self.samples, student_logits.shape[1])
        self.seen.index_copy_(0, batch.index, student_logits.detach())
        self.disk.guide.eval()
        with torch.no_grad():
            guide_logits = self.disk.guide_logits(batch.teacher_logits, batch.teacher_features)
        return self.disk.terms(
            student_logits, batch.teacher_logits, batch.labels, guide_logits=guide_logits
        ).student_loss

    def guide_loss(self, batch: Batch) -> Tensor:
        """Return what the guide descends with the student fixed."""
        self.disk.guide.train()
        student_logits = self.seen.index_select(0, batch.index)
        return self.disk.terms(student_logits, batch.teacher_logits, batch.labels, batch.teacher_features).guide_loss

    def end_guide_passes(self) -> None:
        """Forget what they showed: the log is of the student's."""
        self.disk.reset_statistics()


def made(name: str, *, feature_dim: int, epochs: int, budget: float, samples: int, seed: int) -> Method:
    """Build a method by name; the guide starts from its own seed."""
    kind, settings = METHODS[name]
    if kind == "ce":
        return CE()
    if kind == "kd":
        return KD(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "uniform":
            return DiSK(UniformGuide(discount="auto"), epochs, **settings)
        if kind == "paper":
            guide = GuideHead(NUM_CLASSES, feature_dim, **presets.PAPER["guide"])
            return Paper(guide, epochs, samples, budget=budget, **settings)
        return DiSK(GuideHead(NUM_CLASSES, feature_dim), epochs, **settings)
