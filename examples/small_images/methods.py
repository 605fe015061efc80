"""The distillation methods that the examples compare. A new one is a class here and a line in ``METHODS``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.epoch_report import EpochReport
from disk_plugin.replay import GuideReplay
from disk_plugin.variants import VARIANTS

NUM_CLASSES = 100


class Batch(NamedTuple):
    """Normalised images (N, 3, 32, 32), labels (N,), the teacher's outputs (N, C) and (N, D), positions (N,)."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor
    teacher_features: Tensor
    index: Tensor


class Method(nn.Module):
    """What turns a student's logits into a loss; it owns what it trains beside the student, with its optimizer."""

    searched_as: str | None = None  # whose settings the search froze for it: "kd", "disk" or none
    optimizer: torch.optim.Optimizer | None = None
    guide_passes = 0  # before every as many passes of the student
    step_every = 1  # epochs after which all comes anew: steps of the schedule, passes of the guide
    extra_passes = 0.0  # student forwards per pass over the data beyond the student's own

    @classmethod
    def made(cls, settings: dict[str, Any], **run: Any) -> "Method":
        """Build it from its settings; ``run`` tells feature_dim, epochs, budget and seed to those who need them."""
        return cls(**settings)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss whose backward trains the student, and what trains with it."""
        raise NotImplementedError

    def end_epoch(self) -> dict[str, float]:
        """Close an epoch; return what to log of it."""
        return {}


class CE(Method):
    """Cross-entropy alone."""

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Ignore the teacher."""
        return F.cross_entropy(student_logits, batch.labels)


class KD(Method):
    """Plain distillation, eq. (1)."""

    searched_as = "kd"

    def __init__(self, *, ce_weight: float = 0.1, temperature: float = 4.0) -> None:
        super().__init__()
        self.settings = {"ce_weight": ce_weight, "distill_weight": 1 - ce_weight, "temperature": temperature}

    def extra_repr(self) -> str:
        """Show the settings; a checkpoint is told by them."""
        return str(self.settings)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Weigh cross-entropy and divergence."""
        return functional.kd_loss(student_logits, batch.teacher_logits, batch.labels, **self.settings)


class DiSK(Method):
    """DiSK, student and guide in one step.

    Args:
        feature_dim: D of the teacher.
        epochs: passes of the student, over which the schedule runs.
        budget: delta.
        settings: of ``DiSKLoss``; besides ``variant`` a single changed field of it (``teacher_target``), and
            ``guide_inputs`` "both", "logits" or "features", ``guide_optimizer`` "sgd" (the student's) or "adam",
            ``multiplier`` a number or (smallest, largest), ``periods`` of the schedule.
    """

    searched_as = "disk"

    @classmethod
    def made(cls, settings: dict[str, Any], **run: Any) -> "Method":
        """Build it for a run."""
        return cls(**{**run, **settings})

    def __init__(self, *, feature_dim: int, epochs: int, budget: float, seed: int, **settings: Any) -> None:
        super().__init__()
        loss = {**settings, "budget": budget}
        self.settings = dict(sorted(loss.items()))
        inputs, optimizer = loss.pop("guide_inputs", "both"), loss.pop("guide_optimizer", "sgd")
        multiplier, periods = loss.pop("multiplier", (0.1, 50.0)), loss.pop("periods", 4)
        variant = VARIANTS[loss.pop("variant", "paper")]
        variant = variant._replace(**{key: loss.pop(key) for key in variant._fields if key in loss})
        ce_weight = loss.setdefault("ce_weight", 0.1)
        loss.setdefault("distill_weight", 1 - ce_weight)
        budget = loss.pop("budget")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            guide = GuideHead(
                NUM_CLASSES, feature_dim=0 if inputs == "logits" else feature_dim, use_logits=inputs != "features"
            )
        self.reads_features = inputs != "logits"
        largest = multiplier if isinstance(multiplier, int | float) else multiplier[1]
        self.disk = DiSKLoss(guide, variant=variant, multiplier=largest, **loss)
        low_high = (largest, largest) if isinstance(multiplier, int | float) else tuple(multiplier)
        steps = -(-epochs // self.step_every)
        self.dual = DualScheduler(
            self.disk, epochs=steps, multiplier=low_high, period=max(steps // periods, 1), budget=budget
        )
        self.epoch = 0
        if optimizer == "adam":
            self.optimizer = torch.optim.Adam(guide.parameters(), lr=1e-3)
        else:
            self.optimizer = torch.optim.SGD(guide.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.report = EpochReport()

    def extra_repr(self) -> str:
        """Show the settings; a checkpoint is told by them."""
        return str(self.settings)

    def terms(self, student_logits: Tensor, batch: Batch):
        """Evaluate the loss per sample and note it for the epoch's log."""
        features = batch.teacher_features if self.reads_features else None
        terms = self.disk.terms(student_logits, batch.teacher_logits, batch.labels, features, reduction="none")
        self.report.add(terms)
        return terms

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """One backward for student and guide."""
        return self.terms(student_logits, batch).mean().loss

    def end_epoch(self) -> dict[str, float]:
        """Step the schedule where it is due."""
        log = {"multiplier": self.disk.multiplier.item(), "budget": self.disk.budget.item(), **self.report.means()}
        statistics = self.disk.statistics()
        log |= {"guide_min": statistics.guide_min, "guide_max": statistics.guide_max}
        self.epoch += 1
        if self.epoch % self.step_every == 0:
            self.dual.step()
        self.report = EpochReport()
        return log

    def get_extra_state(self) -> dict[str, Any]:
        """The schedule's progress travels with the module's state."""
        return {"epoch": self.epoch, "dual": self.dual.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the schedule's progress up."""
        self.epoch = state["epoch"]
        self.dual.load_state_dict(state["dual"])


class ReplayDiSK(DiSK):
    """Algorithm 1 on a record: after every third pass of the student three of the guide on what that pass showed.

    Also after the first pass, as there is no record before it and an untrained guide would stay for three.
    """

    step_every = 3

    def __init__(self, *, seed: int, **settings: Any) -> None:
        super().__init__(seed=seed, **settings)
        self.replay = GuideReplay(self.disk, self.optimizer, batch_size=200, seed=seed)

    @property
    def records(self) -> bool:
        """Whether guide passes follow this epoch."""
        return self.epoch == 0 or (self.epoch + 1) % self.step_every == 0

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy and scaffold, which train the student alone."""
        if self.records:
            features = batch.teacher_features if self.reads_features else None
            self.replay.record(student_logits, batch.teacher_logits, batch.labels, features)
        return self.terms(student_logits, batch).mean().student_loss

    def end_epoch(self) -> dict[str, float]:
        """Step the schedule, then train the guide where it is due, for the student's passes that follow."""
        due, log = self.records, super().end_epoch()
        if due:
            self.replay.train_guide(passes=3)
        return log

    def get_extra_state(self) -> dict[str, Any]:
        """The generator travels with the schedule's progress; the record is empty after an epoch."""
        return {**super().get_extra_state(), "replay": self.replay.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them up."""
        super().set_extra_state(state)
        self.replay.load_state_dict(state["replay"])


class AlternatingDiSK(DiSK):
    """DiSK by Algorithm 1: three passes of the guide with the student fixed, then three of the student, then lambda."""

    guide_passes = step_every = 3
    extra_passes = 1.0

    def guide_loss(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Scaffold and budget, which train the guide alone; the log is of the student's passes."""
        features = batch.teacher_features if self.reads_features else None
        return self.disk.terms(student_logits, batch.teacher_logits, batch.labels, features).guide_loss

    def end_guide_passes(self) -> None:
        """Forget what the guide's own passes showed."""
        self.disk.reset_statistics()

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy and scaffold, which train the student alone."""
        return self.terms(student_logits, batch).mean().student_loss


class DiscountBudgetDiSK(DiSK):
    """The budget on the mean discount, a share in [0, 1], instead of on g * CE: an idea to compare, not the paper's.

    Full target, all classes scaffolded. The guide's gradient is autograd's, by its logit, hence Adam.
    """

    @classmethod
    def made(cls, settings: dict[str, Any], **run: Any) -> "Method":
        """Build it for a run."""
        return super().made({"guide_optimizer": "adam", **settings}, **run)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """One backward for student and guide; the guide's half has the value 0."""
        disk, tau, tau_s = self.disk, self.disk.temperature, self.disk.student_temperature
        guide_logits = disk.guide_logits(batch.teacher_logits, batch.teacher_features)
        terms = disk.terms(
            student_logits,
            batch.teacher_logits,
            batch.labels,
            guide_logits=guide_logits.detach(),
            reduction="none",
        )
        self.report.add(terms)
        student, g = student_logits.detach(), guide_logits.sigmoid().unsqueeze(1)
        s, t = (student / tau_s).softmax(1), (batch.teacher_logits / tau).softmax(1)
        discount = 1 - (t * s / (s + g)).sum(1).mean()
        distill = -disk.distill_weight * tau * tau_s * (t * (s + g).log()).sum(1).mean()
        guide_loss = distill + disk.multiplier.float() * (discount - disk.budget.float()).relu()
        return terms.mean().student_loss + guide_loss - guide_loss.detach()


METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
    "disk": DiSK,
    "disk-alternating": AlternatingDiSK,
    "disk-discount-budget": DiscountBudgetDiSK,
    "disk-replay": ReplayDiSK,
}


def make_method(name: str, settings: dict[str, Any], **run: Any) -> Method:
    """Build a method by name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    return METHODS[name].made(settings, **run)
