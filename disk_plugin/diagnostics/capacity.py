"""Should I use DiSK here? What limits the student, capacity or data, and the recommendation that follows."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .. import _checks
from ._accuracy import compare
from ._layers import input_width, last_linear, linears, overlaps

Verdict = Literal["DiSK", "KD"]

# percent points, of the rule in examples/results/regime_map.json, derived by examples/regime/rule.py
SMALLEST_CAPACITY_GAP, LARGEST_DATA_GAP = 35.0, 30.0
# a student below either was hardly trained: 1.5 times chance, 1 / C, or a tenth of the way from there to 1
NEAR_CHANCE, NEAR_CHANCE_OF_FEW = 1.5, 0.1
FEWEST_CLASSES = 10  # of the map's problems
# of a convolutional student, for which no gain is shown from here on: docs/evidence/few_features.md
ENOUGH_FEATURES = 16
_GROUNDS = (
    "This rests on a map of small MLPs, where the gain is largest with few features for many classes, and on a "
    "convolutional network, which gained over 2 points with 4 features for 100 classes, some .8 with 8, and nothing "
    "clear with 16 (https://disk-plugin.github.io/disk-plugin/evidence/). One look cannot tell a student without "
    "capacity from one that has not converged, as both fit little: look at one that has stopped improving."
)

# arguments of DiSKLoss for each verdict
SETTINGS: dict[str, dict[str, Any]] = {
    "DiSK": {"ce_weight": 0.0, "discount": "auto"},
    "KD": {"ce_weight": 0.0, "discount": 0.0},  # a discount of 0 is plain distillation
}


class CapacityGap(NamedTuple):
    """Result of ``capacity_gap``; accuracies are in [0, 1]. ``print`` it for the recommendation in words.

    Attributes:
        student_train: accuracy of the student on the training data.
        student_held_out: accuracy of the student on the held-out data.
        teacher_train: accuracy of the teacher on the training data.
        teacher_held_out: accuracy of the teacher on the held-out data.
        agreement: share of the training data on which the student's argmax is the teacher's.
        train_samples: number of training samples read.
        held_out_samples: number of held-out samples read.
        num_classes: C.
        feature_dim: input width of the last Linear that ran in the student; None if it has not C outputs.
        convolutional: whether the student has a convolution whose windows overlap, be it in a transformer's stem.
    """

    student_train: float
    student_held_out: float
    teacher_train: float
    teacher_held_out: float
    agreement: float
    train_samples: int
    held_out_samples: int
    num_classes: int
    feature_dim: int | None
    convolutional: bool = False

    @property
    def by_capacity(self) -> float:
        """Capacity gap: the teacher's accuracy minus the student's, on training data."""
        return self.teacher_train - self.student_train

    @property
    def by_data(self) -> float:
        """Generalization gap: the student's accuracy on training minus that on held-out data."""
        return self.student_train - self.student_held_out

    @property
    def verdict(self) -> Verdict:
        """``"DiSK"`` if our experiments show a gain there; ``"KD"`` if they show none, or it is too early to tell."""
        return self._judge()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The recommendation as arguments: ``DiSKLoss(GuideHead(...), **gap.kwargs, temperature=...)``.

        For ``"KD"`` they give plain distillation. Use the temperature that is best for KD. A ``UniformGuide`` takes
        ``discount`` itself.
        """
        return dict(SETTINGS[self.verdict])

    @property
    def recommendation(self) -> str:
        """The verdict and its reason in words."""
        return self._judge()[1]

    def _judge(self) -> tuple[Verdict, str]:
        chance = 1 / self.num_classes
        if self.student_train < min(NEAR_CHANCE * chance, chance + NEAR_CHANCE_OF_FEW * (1 - chance)):
            return "KD", (
                f"none yet: the student is near chance ({chance:.1%} with {self.num_classes} classes) on its training "
                f"data; train it first, with cross-entropy or KD, then look again"
            )
        if self.teacher_held_out <= self.student_held_out:
            return "KD", "KD, or another teacher: this one is not ahead of the student on held-out data"
        if self.num_classes < FEWEST_CLASSES:
            return "KD", (
                f"KD; with {self.num_classes} classes nothing is known, as our experiments have {FEWEST_CLASSES} or "
                f"more: compare both, or stay with KD"
            )
        if 100 * self.by_capacity < SMALLEST_CAPACITY_GAP:
            return "KD", (
                f"KD; no clear difference is expected, as the student fits most of what the teacher fits (gap by "
                f"capacity below {SMALLEST_CAPACITY_GAP:g} points)"
            )
        if 100 * self.by_data > LARGEST_DATA_GAP:
            return "KD", (
                f"KD; data limit the student (gap by data above {LARGEST_DATA_GAP:g} points), where DiSK gained half a "
                f"point at most"
            )
        if self.convolutional and (self.feature_dim is None or self.feature_dim >= ENOUGH_FEATURES):
            unless = "" if self.feature_dim else " unless its last layer, which was not found, has fewer"
            return "KD", (
                f"KD{unless}; no convolutional student with {ENOUGH_FEATURES} features or more has gained in our "
                f"experiments, whatever its gaps: compare both, or stay with KD"
            )
        return "DiSK", (
            f"DiSK; the student is limited by its capacity (gap by capacity of {SMALLEST_CAPACITY_GAP:g} points or "
            f"more, by data of {LARGEST_DATA_GAP:g} or less)"
        )

    def __str__(self) -> str:
        """Format the accuracies, the gaps, the recommendation and its basis."""
        parts = (self.student_train, self.train_samples), (self.student_held_out, self.held_out_samples)
        error = sum(share * (1 - share) / count for share, count in parts) ** 0.5
        capacity, data, error = (100 * value for value in (self.by_capacity, self.by_data, error))
        rows = [
            ("", "training", "held-out", f"({self.train_samples:,} and {self.held_out_samples:,} samples)"),
            ("teacher", f"{self.teacher_train:.1%}", f"{self.teacher_held_out:.1%}", ""),
            ("student", f"{self.student_train:.1%}", f"{self.student_held_out:.1%}", ""),
            ("agreement", f"{self.agreement:.1%}", "", ""),
        ]
        lines = [f"{name:9} {train:>9} {held_out:>9}   {note}".rstrip() for name, train, held_out, note in rows]
        width = "not found" if self.feature_dim is None else str(self.feature_dim)
        lines += [
            f"Gap by capacity {capacity:+.1f} points, by data {data:+.1f} ± {error:.1f} (standard error);",
            f"{self.num_classes} classes, width of the student's last layer: {width}.",
            f"Recommendation: {self.recommendation}.",
        ]
        return "\n".join([*lines, _GROUNDS])


def capacity_gap(
    student: nn.Module,
    teacher: nn.Module,
    train_loader: Iterable[Any],
    held_out_loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    ignore_index: int = -100,
) -> CapacityGap:
    """Measure what limits a trained student; recommend DiSK or plain distillation (KD).

    DiSK drops what the student cannot fit, so that it fits the rest better. That helps if capacity limits the student:
    its training accuracy is then far below the teacher's and close to its own held-out accuracy. If data limit the
    student, it hurts. The thresholds are those of docs/evidence/regime_map.md, the number of features from which on a
    convolutional student is not expected to gain is that of docs/evidence/few_features.md.

    Train the student with cross-entropy or KD **to convergence** first. A student that is still learning has a low
    training accuracy too, and one measurement cannot tell the two apart. Measure again some epochs later: as long as
    ``by_capacity`` shrinks, capacity is not the limit. Use the evaluation transform for both loaders, as random
    augmentation lowers training accuracy, and shuffle the training loader if ``max_batches`` truncates it.

    Both models run in evaluation mode without gradients, on the same batches; each module's mode is restored.

    Args:
        student: a trained classifier; for its outputs see ``disk_plugin.taps.logits_of``.
        teacher: a classifier of the same classes.
        train_loader: batches (x, target, ...) of the data the student was trained on; target are class indices (N,) or
            (N, d1, ...).
        held_out_loader: batches of data that neither was trained on.
        device: where the batches are moved to; None for each model's device.
        max_batches: number of batches to read from each loader; None for all.
        ignore_index: target value that is ignored.

    Returns:
        The accuracies, both gaps, and the recommendation as words and as arguments of ``DiSKLoss``.

    Raises:
        ValueError: a loader without samples, or the same one twice; logits of different shapes or with NaN; targets
            of another shape, or outside the classes; ``max_batches`` < 1.
        TypeError: models that are not modules or return no logits; batches that are not tuples; targets that are not
            class indices.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> x, teacher, student = torch.randn(512, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        >>> y = teacher(x).argmax(1)
        >>> gap = capacity_gap(student, teacher, [(x[:256], y[:256])], [(x[256:], y[256:])])
        >>> gap.teacher_train, gap.by_capacity > 0.5, gap.num_classes, gap.feature_dim
        (1.0, True, 6, 6)
    """
    for name, model in {"student": student, "teacher": teacher}.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a Module, got {type(model).__name__}")
    if train_loader is held_out_loader:
        raise ValueError(
            "held_out_loader must hold data that the student was not trained on, got train_loader again: the gap by "
            "data would be 0"
        )
    if max_batches is not None:
        _checks.integer("max_batches", max_batches, at_least=1)
    _checks.integer("ignore_index", ignore_index)
    with last_linear(student) as last:
        train, held_out = (
            compare(student, teacher, loader, name, device=device, max_batches=max_batches, ignore_index=ignore_index)
            for name, loader in {"train_loader": train_loader, "held_out_loader": held_out_loader}.items()
        )
    return CapacityGap(
        student_train=train.student_right / train.samples,
        student_held_out=held_out.student_right / held_out.samples,
        teacher_train=train.teacher_right / train.samples,
        teacher_held_out=held_out.teacher_right / held_out.samples,
        agreement=train.agree / train.samples,
        train_samples=train.samples,
        held_out_samples=held_out.samples,
        num_classes=train.num_classes,
        feature_dim=input_width(last or linears(student)[-1:], train.num_classes),
        convolutional=any(overlaps(module) for module in student.modules()),
    )
