"""The quickstart's figure: accuracies and differences, the guide over the epochs, the most discounted images."""

from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from disk_plugin import DiSKLoss
from disk_plugin.functional import DiSKTerms

from .problems import Problem

WATCHED, SAMPLED, SHOWN = 5, 900, 8  # seeds and training samples of the curves, images of the gallery


class Image(NamedTuple):
    """A training image, its label, the student's and the teacher's predictions, and its discount."""

    pixels: Tensor
    label: int
    student: int
    teacher: int
    discount: float


class Seen(NamedTuple):
    """A guide's history: the mean of each quantity per epoch over the watched seeds; the most discounted images."""

    curves: dict[str, list[float]]
    images: list[Image]


class Watch:
    """Evaluates some seeds' guides after each epoch, on a fixed sample of the training data."""

    def __init__(self, problem: Problem, losses: list[DiSKLoss]) -> None:
        self.problem, self.losses = problem, losses
        generator = torch.Generator().manual_seed(0)
        self.index = torch.randperm(len(problem.train.y), generator=generator)[:SAMPLED]
        self.epochs: list[list[dict[str, float]]] = []

    def __call__(self, students: list[nn.Module]) -> None:
        """Evaluate after an epoch, before the schedulers step."""
        pairs = zip(students, self.losses, strict=False)
        self.epochs.append([self._means(student, disk) for student, disk in pairs])

    def end(self, student: nn.Module, views: int) -> Seen:
        """Return the curves, and the first seed's images with the largest discount, one per digit.

        The training data hold ``views`` copies of all images.
        """
        curves = {
            name: torch.tensor([[seed[name] for seed in epoch] for epoch in self.epochs]).nanmean(1).tolist()
            for name in self.epochs[0][0]
        }
        everything = torch.arange(len(self.problem.train.y))
        discount = self._terms(student, self.losses[0], everything).discount
        images: dict[int, Image] = {}
        for position in discount.argsort(descending=True).tolist():
            images.setdefault(position % (len(everything) // views), self._image(position, student, discount))
            if len(images) == SHOWN:
                break
        return Seen(curves, [*images.values()])

    @torch.no_grad()
    def _terms(self, student: nn.Module, disk: DiSKLoss, index: Tensor) -> DiSKTerms:
        problem, (x, y) = self.problem, self.problem.train
        teacher = problem.teacher_logits[index], y[index], problem.teacher_features[index]
        disk.eval()
        terms = disk.terms(student(x[index]), *teacher, reduction="none")
        disk.train()
        return terms

    def _means(self, student: nn.Module, disk: DiSKLoss) -> dict[str, float]:
        terms = self._terms(student, disk, self.index)
        right = terms.correct.bool()
        means = {"target": disk.level.target.item()}
        for name, value in {"g": terms.guide, "discount": terms.discount}.items():
            means |= {f"{name}, right": value[right].mean().item(), f"{name}, wrong": value[~right].mean().item()}
        return means

    def _image(self, position: int, student: nn.Module, discount: Tensor) -> Image:
        x, y = (part[position] for part in self.problem.train)
        said = student(x[None]).argmax().item(), self.problem.teacher_logits[position].argmax().item()
        return Image(x.view(8, 8), y.item(), *said, discount[position].item())


def figure(results: dict[str, Any], seen: dict[str, Seen]) -> Figure:
    """Draw a row for each problem."""
    fig = Figure(figsize=(15, 4.2 * len(seen)), layout="constrained")
    rows = fig.subfigures(len(seen), 1, squeeze=False).ravel()
    for row, (name, what) in zip(rows, seen.items(), strict=True):
        row.suptitle(name, fontsize=13, fontweight="bold")
        parts = row.subfigures(1, 3, width_ratios=(2.2, 1.3, 1.3))
        _accuracies(parts[0], results["problems"][name])
        _guide(parts[1], what.curves)
        _gallery(parts[2], what.images)
    return fig


def _accuracies(part: Any, found: dict[str, Any]) -> None:
    left, right = part.subplots(1, 2)
    methods = list(found["methods"])
    for row, method in enumerate(methods):
        values = torch.tensor(found["methods"][method]["test"])
        left.plot(values, [row] * len(values), "|", color="C0", alpha=0.4, markersize=9)
        left.plot(values.mean(), row, "o", color="C0")
    left.set_yticks(range(len(methods)), [method.replace(", ", ",\n") for method in methods])
    left.invert_yaxis()
    left.set_xlabel("test accuracy (%)")
    left.set_title("each seed, and the mean", fontsize=10)
    for row, (pair, one) in enumerate(found["differences"].items()):
        low, high = one["interval_95"]
        colour = "C2" if low > 0 else "C3" if high < 0 else "0.4"
        right.plot([low, high], [row, row], color=colour, linewidth=2)
        right.plot(one["mean"], row, "o", color=colour)
        right.annotate(
            pair,
            (0.5, row),
            (0, 8),
            ("axes fraction", "data"),
            "offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the line at 0
        )
    right.axvline(0, color="black", linewidth=0.8, zorder=0)
    right.set_yticks([])
    right.set_ylim(len(found["differences"]) - 0.6, -0.7)
    right.margins(x=0.25)
    right.set_xlabel("points")
    right.set_title("paired differences, 95 % intervals", fontsize=10)


def _guide(part: Any, curves: dict[str, list[float]]) -> None:
    upper, lower = part.subplots(2, 1, sharex=True)
    epochs = range(1, len(curves["target"]) + 1)
    for axes, name, colour in ((upper, "g", "C0"), (lower, "discount", "C1")):
        for which, style in (("right", "-"), ("wrong", "--")):
            axes.plot(epochs, curves[f"{name}, {which}"], color=colour, linestyle=style, label=which)
    lower.plot(epochs, curves["target"], color="0.4", linestyle=":", label="target of the mean")
    largest = max(max(curves["g, right"]), max(curves["g, wrong"]))
    upper.set(yscale="log", ylabel="mean g", ylim=(largest / 1000, 2 * largest))  # it starts near 0
    lower.set(xlabel="epoch", ylabel="mean discount", ylim=(0, None))
    for axes in (upper, lower):
        axes.legend(
            fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1, frameon=False
        )
    upper.set_title("DiSK's guide where the student is right, and wrong", fontsize=10, pad=18)


def _gallery(part: Any, images: list[Image]) -> None:
    part.suptitle("training images with the largest discount", fontsize=10)
    for axes, image in zip(part.subplots(2, SHOWN // 2).flat, images, strict=False):
        axes.imshow(image.pixels.numpy(), cmap="gray_r")
        colour = "C2" if image.student == image.label else "C3"
        axes.text(
            0.5,
            -0.05,
            f"label {image.label}\nstudent {image.student}\nteacher {image.teacher}\ndiscount {image.discount:.2f}",
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=8,
            color=colour,
        )
        axes.axis("off")
