"""The guide's half of Algorithm 1 for many starts at once: one :class:`DiSKLoss` with its own guide per start."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.functional import DiSKTerms
from disk_plugin.training import guide_pass

from .starts import LEARNING_RATE, WEIGHT_DECAY, Problem, Starts


class Guides:
    """Guides, losses and their optimizer.

    Args:
        problem: the training data.
        settings: of the loss: ce_weight, temperature, student_temperature, top_k, budget; of the schedule: multiplier
            (smallest, largest) and period; ``guide``: arguments of :class:`GuideHead`, with ``inputs`` ("both",
            "logits", "features") and the optimizer's ``lr``, ``weight_decay`` and ``gradient_scale``.
        starts: S.
        iterations: R.
    """

    def __init__(self, problem: Problem, settings: dict[str, Any], starts: int, iterations: int) -> None:
        own = dict(settings["guide"])
        self.inputs = own.pop("inputs", "both")
        optimizer = {"lr": own.pop("lr", LEARNING_RATE), "weight_decay": own.pop("weight_decay", WEIGHT_DECAY)}
        scale = own.pop("gradient_scale", None)
        width = 0 if self.inputs == "logits" else problem.teacher_features.shape[1]
        smallest, largest = settings["multiplier"]
        losses = [
            DiSKLoss(
                GuideHead(problem.teacher_logits.shape[1], width, use_logits=self.inputs != "features", **own),
                distill_weight=1 - settings["ce_weight"],
                guide_gradient_scale=scale,
                **{key: settings[key] for key in ("ce_weight", "temperature", "top_k", "budget")},
                student_temperature=settings.get("student_temperature"),
            )
            for _ in range(starts)
        ]
        self.leader = losses[0]  # its multiplier is used by all
        self.losses = Starts(losses)
        self.optimizer = self.losses.sgd(**optimizer)
        period = min(settings["period"], iterations)
        self.dual = DualScheduler(self.leader, epochs=iterations, multiplier=(smallest, largest), period=period)

    def train(self, students: Starts, batches: Iterator[Problem], steps: int) -> None:
        """Train the guides with the students fixed, then step the multiplier."""
        self.losses.buffers["multiplier"].fill_(self.leader.multiplier)

        def guide_loss(batch: Problem) -> Tensor:
            with torch.no_grad():
                logits = students(batch.x, in_dims=None)
            return self._terms(logits, batch).guide_loss.sum()

        guide_pass(self.optimizer, islice(batches, steps), guide_loss)
        self.dual.step()

    def student_loss(self, logits: Tensor, batch: Problem) -> Tensor:
        """Sum the students' losses (S,) with the guides fixed."""
        return self._terms(logits, batch).student_loss.sum()

    def values(self, problem: Problem) -> Tensor:
        """Return every guide's g over the data, (S, N), in evaluation mode."""
        features = () if self.inputs == "logits" else (problem.teacher_features,)
        with torch.no_grad():
            self.losses.train(False)
            return self.losses(problem.teacher_logits, *features, in_dims=None, method="guide_logits").sigmoid()

    def _terms(self, logits: Tensor, batch: Problem) -> DiSKTerms:
        features = None if self.inputs == "logits" else batch.teacher_features
        inputs = (logits, batch.teacher_logits, batch.y, features)
        return self.losses(*inputs, in_dims=(0, None, None, None), method="terms")
