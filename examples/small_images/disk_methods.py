"""The forms of DiSK: guide and loss are settings; the alternation of guide and student passes is a class.

Settings have the shape of the package's presets, and are passed on unchanged:
``{"guide": ..., "loss": ..., "dual": ..., "guide_optimizer": "sgd" or "adam"}``, of which "loss" is required.
``"guide": {"kind": "uniform", ...}`` takes a ``UniformGuide``, anything else is a ``GuideHead``'s. ``"budget":
"error"`` in the loss stands for the error of the warm start, the paper's heuristic. With only the loss's temperature it
is the package's default form.
"""

from typing import Any

import torch
from torch import Tensor

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.epoch_report import EpochReport
from disk_plugin.replay import GuideReplay
from disk_plugin.uniform import UniformGuide
from disk_plugin.variants import VARIANTS

from .method import Batch, Method

NUM_CLASSES = 100


def in_nats(settings: dict[str, Any], *, feature_dim: int, budget: float, steps: int) -> dict[str, Any]:
    """Convert the searches' flat settings, all with the paper's budget, to the shape of a preset.

    Args:
        settings: of ``DiSKLoss``; besides ``variant`` a single changed field of it (``teacher_target``), and
            ``guide_inputs`` "both", "logits" or "features", ``guide_optimizer``, ``multiplier`` a number or
            (smallest, largest), ``budget`` a number or (upper, lower), ``periods`` of the schedule.
        feature_dim: D of the teacher.
        budget: default, if the settings have none.
        steps: number of steps of the schedule.
    """
    loss = {"ce_weight": 0.1, "temperature": 4.0, **settings}
    loss.setdefault("distill_weight", 1 - loss["ce_weight"])
    inputs, optimizer = loss.pop("guide_inputs", "both"), loss.pop("guide_optimizer", "sgd")
    guide = {"feature_dim": 0 if inputs == "logits" else feature_dim, "use_logits": inputs != "features"}
    multiplier, periods = loss.pop("multiplier", (0.1, 50.0)), loss.pop("periods", 4)
    low_high = (multiplier, multiplier) if isinstance(multiplier, int | float) else tuple(multiplier)
    variant = VARIANTS[loss.pop("variant", "paper")]
    variant = variant._replace(**{key: loss.pop(key) for key in variant._fields if key in loss})
    dual = {"multiplier": low_high, "period": max(steps // periods, 1), "budget": loss.pop("budget", budget)}
    loss |= {"variant": variant, "discount": None}
    return {"guide": guide, "loss": loss, "dual": dual, "guide_optimizer": optimizer}


def make_guide(settings: dict[str, Any], num_classes: int, feature_dim: int, seed: int) -> GuideHead | UniformGuide:
    """Build the guide, a network from its own seed."""
    settings = dict(settings)
    if settings.pop("kind", "head") == "uniform":
        return UniformGuide(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GuideHead(num_classes, **{"feature_dim": feature_dim, **settings})


class DiSK(Method):
    """DiSK, student and guide in one step.

    Args:
        feature_dim: D of the teacher.
        epochs: passes of the student, the length of the schedule.
        seed: of the guide.
        num_classes: C.
        guide: of ``GuideHead``, or with ``kind`` "uniform" of ``UniformGuide``.
        loss: of ``DiSKLoss``.
        dual: of ``DualScheduler``.
        guide_optimizer: "sgd", the student's, or "adam".
    """

    searched_as = "disk"

    @classmethod
    def made(cls, settings: dict[str, Any], *, budget: float = 0.0, **run: Any) -> "Method":
        """Build the method for a run, from settings of either shape."""
        if "loss" not in settings:
            steps = -(-run["epochs"] // cls.step_every)
            settings = in_nats(settings, feature_dim=run["feature_dim"], budget=budget, steps=steps)
        elif settings["loss"].get("budget") == "error":
            settings = {**settings, "loss": {**settings["loss"], "budget": budget}}
        return cls(**settings, **run)

    def __init__(
        self,
        *,
        feature_dim: int,
        epochs: int,
        seed: int,
        loss: dict[str, Any],
        guide: dict[str, Any] | None = None,
        dual: dict[str, Any] | None = None,
        guide_optimizer: str = "sgd",
        num_classes: int = NUM_CLASSES,
    ) -> None:
        super().__init__()
        guide, dual = guide or {}, dual or {}
        self.settings = {"guide": guide, "loss": loss, "dual": dual, "guide_optimizer": guide_optimizer}
        head = make_guide(guide, num_classes, feature_dim, seed)
        self.reads_features = isinstance(head, GuideHead) and head.feature_dim > 0
        self.disk = DiSKLoss(head, **loss)
        self.dual = DualScheduler(self.disk, epochs=-(-epochs // self.step_every), **dual)
        self.epoch = 0
        parameters = list(head.parameters())
        if guide_optimizer == "adam":
            self.optimizer = torch.optim.Adam(parameters, lr=1e-3)
        elif parameters:
            self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.report = EpochReport()

    def extra_repr(self) -> str:
        """Show the settings, which identify a checkpoint."""
        return str(self.settings)

    def terms(self, student_logits: Tensor, batch: Batch, guide_logits: Tensor | None = None):
        """Evaluate the loss per sample and add it to the epoch's log."""
        terms = self.disk.terms(
            student_logits,
            batch.teacher_logits,
            batch.labels,
            self.features(batch),
            guide_logits=guide_logits,
            reduction="none",
        )
        self.report.add(terms)
        return terms

    def features(self, batch: Batch) -> Tensor | None:
        """Return the guide's inputs besides the teacher's logits."""
        return batch.teacher_features if self.reads_features else None

    def student_loss(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy and scaffold, which train only the student, with the guide in evaluation mode."""
        guide = self.disk.guide.eval()  # BatchNorm uses its running statistics
        with torch.no_grad():
            guide_logits = self.disk.guide_logits(batch.teacher_logits, self.features(batch))
        guide.train()
        return self.terms(student_logits, batch, guide_logits).mean().student_loss

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """One backward for student and guide."""
        return self.terms(student_logits, batch).mean().loss

    def end_epoch(self) -> dict[str, float]:
        """Step the schedule if it is due."""
        log = {"multiplier": self.disk.multiplier.item(), "budget": self.disk.budget.item(), **self.report.means()}
        statistics = self.disk.statistics()
        log |= {"guide_min": statistics.guide_min, "guide_max": statistics.guide_max}
        self.epoch += 1
        if self.epoch % self.step_every == 0:
            self.dual.step()
        self.report = EpochReport()
        return log

    def get_extra_state(self) -> dict[str, Any]:
        """Return the schedule's progress, saved with the module's state."""
        return {"epoch": self.epoch, "dual": self.dual.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the schedule's progress."""
        self.epoch = state["epoch"]
        self.dual.load_state_dict(state["dual"])


class ReplayDiSK(DiSK):
    """Algorithm 1 on a record: after every third pass of the student three of the guide on that pass's record.

    Also after the first pass, as otherwise the guide would stay untrained for three passes.
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
        """Record if it is due, and train only the student."""
        if self.records:
            self.replay.record(student_logits, batch.teacher_logits, batch.labels, self.features(batch))
        return self.student_loss(student_logits, batch)

    def end_epoch(self) -> dict[str, float]:
        """Step the schedule, then train the guide if it is due, for the student's passes that follow."""
        due, log = self.records, super().end_epoch()
        if due:
            self.replay.train_guide(passes=3)
        return log

    def get_extra_state(self) -> dict[str, Any]:
        """Return the generator's state with the schedule's progress; the record is empty after an epoch."""
        return {**super().get_extra_state(), "replay": self.replay.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load them."""
        super().set_extra_state(state)
        self.replay.load_state_dict(state["replay"])


class AlternatingDiSK(DiSK):
    """DiSK by Algorithm 1: three passes of the guide with the student fixed, then three of the student, then lambda."""

    guide_passes = step_every = 3
    extra_passes = 1.0

    def guide_loss(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Scaffold and budget, which train only the guide; not logged, as the log is of the student's passes."""
        return self.disk.terms(student_logits, batch.teacher_logits, batch.labels, self.features(batch)).guide_loss

    def end_guide_passes(self) -> None:
        """Reset the statistics of the guide's own passes."""
        self.disk.reset_statistics()

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """Train only the student."""
        return self.student_loss(student_logits, batch)


class DiscountBudgetDiSK(DiSK):
    """The budget on the mean discount, a share in [0, 1], instead of on g * CE: an idea to compare, not the paper's.

    Full target, all classes scaffolded. The guide's gradient is autograd's, w.r.t. its logit, hence Adam.
    """

    @classmethod
    def made(cls, settings: dict[str, Any], **run: Any) -> "Method":
        """Build it for a run."""
        return super().made({"guide_optimizer": "adam", **settings}, **run)

    def forward(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """One backward for student and guide; the guide's half has the value 0."""
        disk, tau, tau_s = self.disk, self.disk.temperature, self.disk.student_temperature
        guide_logits = disk.guide_logits(batch.teacher_logits, batch.teacher_features)
        terms = self.terms(student_logits, batch, guide_logits.detach())
        student, g = student_logits.detach(), guide_logits.sigmoid().unsqueeze(1)
        s, t = (student / tau_s).softmax(1), (batch.teacher_logits / tau).softmax(1)
        discount = 1 - (t * s / (s + g)).sum(1).mean()
        distill = -disk.distill_weight * tau * tau_s * (t * (s + g).log()).sum(1).mean()
        guide_loss = distill + disk.multiplier.float() * (discount - disk.budget.float()).relu()
        return terms.mean().student_loss + guide_loss - guide_loss.detach()
