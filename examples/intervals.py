"""Table 1, 1D intervals: in how many of 100 random starts does a one-interval student find the global minimum?

Blue points lie in [2, 3] and [5, 7] of [0, 9], the teacher has two intervals and the student one (appendix A.1). The
student's minima are A = [2, 3], B = [2, 7] and C = [5, 7], which the paper calls global; "elsewhere" is none of them.
What the paper leaves open is fixed here: the slope kappa = 10, the clamp of the probability at 1e-6, all samples in
each gradient step. Settings are frozen in results/intervals_search.json (``--search``).

Usage: python examples/intervals.py [--dry-run] [--search | --ablate] [--out DIR]
"""

import functools
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from toys import table1
from toys.starts import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Problem, Starts, Trained, student_loss

KAPPA, CLAMP, WIDTH, SAMPLES = 10.0, 1e-6, 9.0, 1000
BLUE = ((2.0, 3.0), (5.0, 7.0))
MINIMA = {"A [2, 3]": (2.0, 3.0), "B [2, 7]": (2.0, 7.0), "C [5, 7], global": (5.0, 7.0)}
REACH = 1.0  # a start belongs to a minimum if both ends are that near


class Intervals(nn.Module):
    """A sum of soft intervals sigmoid(kappa (x - a)) - sigmoid(kappa (x - b)), each with random ends a < b."""

    def __init__(self, count: int, kappa: float = KAPPA, clamp: float = CLAMP) -> None:
        super().__init__()
        self.kappa, self.clamp = kappa, clamp
        self.ends = nn.Parameter((WIDTH * torch.rand(2 * count).sort().values).view(count, 2))

    def features(self, x: Tensor) -> Tensor:
        """Return each interval's value: (N,) -> (N, count)."""
        steps = torch.sigmoid(self.kappa * (x[:, None, None] - self.ends))
        return steps[..., 0] - steps[..., 1]

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities of red and blue as logits: (N,) -> (N, 2)."""
        blue = self.features(x).sum(1).clamp(self.clamp, 1 - self.clamp)
        return torch.stack([torch.log1p(-blue), blue.log()], 1)


def is_blue(x: Tensor) -> Tensor:
    """Label of each point."""
    return torch.stack([(low < x) & (x < high) for low, high in BLUE]).any(0)


def sample(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points, half of them blue."""
    generator = torch.Generator().manual_seed(1000 + seed)
    pool = WIDTH * torch.rand(20 * count, generator=generator)
    blue = is_blue(pool)
    x = torch.cat([pool[blue][: count // 2], pool[~blue][: count - count // 2]])
    return x, is_blue(x).long()


def trained_teacher(x: Tensor, y: Tensor, kappa: float, clamp: float, restarts: int = 20) -> Intervals:
    """Fit two intervals a < b < c < d (A.1) with cross-entropy from random starts; keep the one that fits best.

    Raises:
        RuntimeError: every start ended elsewhere, as one interval less its gap does.
    """
    torch.manual_seed(0)
    best: tuple[float, Intervals] | None = None
    for _ in range(restarts):
        teacher = Intervals(2, kappa, clamp)
        optimizer = torch.optim.SGD(teacher.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
        for _ in range(200):
            loss = F.cross_entropy(teacher(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        (first, second), (third, fourth) = sorted(teacher.ends.tolist())
        if first < second < third < fourth and (best is None or loss.item() < best[0]):
            best = loss.item(), teacher
    if best is None:
        raise RuntimeError(f"expected two intervals a < b < c < d after training, got none in {restarts} starts")
    return best[1]


@functools.cache
def problem(seed: int, kappa: float = KAPPA, clamp: float = CLAMP) -> Problem:
    """Training data and the teacher's outputs on them; its features are the values of its two intervals."""
    x, y = sample(SAMPLES, seed)
    teacher = trained_teacher(x, y, kappa, clamp)
    with torch.no_grad():
        return Problem(x, y, teacher(x), teacher.features(x))


def ends_of(students: Starts) -> Tensor:
    """Both ends of every student's interval, (S, 2)."""
    return students.parameters["ends"].detach()[:, 0]


def classify(students: Starts, _problem: Problem, _seed: int) -> Tensor:
    """Nearest minimum of each start, by the interval's ends."""
    distance = (ends_of(students)[:, None] - torch.tensor(list(MINIMA.values()))).abs().amax(2)
    nearest = distance.min(1)
    return torch.where(nearest.values < REACH, nearest.indices + 1, 0)


def make_toy(kappa: float = KAPPA, clamp: float = CLAMP, batch_size: int | None = None) -> table1.Toy:
    """Return the problem, with what the paper leaves open as arguments."""
    return table1.Toy(
        name="intervals",
        minima=("elsewhere", *MINIMA),
        paper={
            method: dict(zip(MINIMA, counts, strict=True))
            for method, counts in {"CE": (35, 64, 1), "KD": (30, 67, 3), "DiSK": (9, 1, 90)}.items()
        },
        make_student=lambda: Intervals(1, kappa, clamp),
        make_problem=lambda seed: problem(seed, kappa, clamp),
        classify=classify,
        trials=table1.RANGES,
        iterations=67,
        batch_size=batch_size,
    )


TOY = make_toy()
# a change to the problem or to DiSK's frozen settings
ABLATIONS: dict[str, tuple[table1.Toy, dict[str, Any]]] = {
    "as reported": (TOY, {}),
    "kappa 5": (make_toy(kappa=5.0), {}),
    "clamp 1e-3": (make_toy(clamp=1e-3), {}),
    "kappa 5, clamp 1e-3": (make_toy(kappa=5.0, clamp=1e-3), {}),
    **table1.OPEN_SETTINGS,
}


def surface(settings: dict[str, Any], data: Problem, guide: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a grid of ends and the student's loss there, per sample's mean; ``guide`` (N,) is held fixed."""
    grid = torch.linspace(0, WIDTH, 61)
    losses = torch.full((len(grid), len(grid)), float("nan"))
    student = Intervals(1)
    for i, low in enumerate(grid):
        for j in range(i + 1, len(grid)):
            student.ends.data = torch.stack([low, grid[j]]).view(1, 2)
            with torch.no_grad():
                losses[i, j] = student_loss(student(data.x), data, settings, guide)
    return grid, losses


def figures(toy: table1.Toy, results: dict[str, Any], trained: dict[str, Trained], out: Path) -> None:
    """Draw both loss surfaces with all end points, the decision functions, and g and discount over the data."""
    data = problem(table1.REPORT_SEED)
    disk = trained["DiSK"]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    top = figure.subplots(2, 3)
    guide = disk.guide.mean(0).clamp(1e-6, 1 - 1e-6)
    for axes, method, held in ((top[0, 0], "KD", None), (top[0, 1], "DiSK", guide)):
        grid, losses = surface(results["settings"][method], data, held)
        image = axes.contourf(grid, grid, losses.T, levels=30, cmap="viridis")
        ends = ends_of(trained[method].students)
        axes.scatter(*ends.T, s=10, color="red", label="ends of the starts")
        for name, (low, high) in MINIMA.items():
            axes.annotate(name[0], (low, high), color="white", weight="bold")
        axes.set(title=f"loss of the student under {method}", xlabel="a", ylabel="b", xlim=(0, WIDTH), ylim=(0, WIDTH))
        axes.legend(loc="lower right")
        figure.colorbar(image, ax=axes)
    bars = top[0, 2]
    for shift, method in enumerate(table1.METHODS):
        counts = results["counts"][method]
        bars.bar([i + 0.27 * shift for i in range(len(counts))], list(counts.values()), 0.25, label=method)
    bars.set_xticks([i + 0.27 for i in range(len(toy.minima))], [name.split(",")[0] for name in toy.minima])
    bars.set(title="starts per minimum", ylabel=f"of {results['starts']}")
    bars.legend()
    order = data.x.argsort()
    for axes, values, name in ((top[1, 0], disk.guide, "g"), (top[1, 1], disk.discount, "discount")):
        axes.plot(data.x[order], values[:, order].mean(0), color="black")
        axes.fill_between(data.x[order], *values[:, order].quantile(torch.tensor([0.1, 0.9]), 0), alpha=0.3)
        axes.set(title=f"{name} at the end: mean and middle 80 % of starts", xlabel="x", ylabel=name, ylim=(0, 1))
        for low, high in BLUE:
            axes.axvspan(low, high, color="blue", alpha=0.1)
    grid = torch.linspace(0, WIDTH, 400)
    for method, colour in (("KD", "tab:orange"), ("DiSK", "tab:green")):
        with torch.no_grad():
            blue = trained[method].students(grid, in_dims=None)[..., 1].exp()
        top[1, 2].plot(grid, blue.mean(0), color=colour, label=f"{method}: mean over starts")
    for low, high in BLUE:
        top[1, 2].axvspan(low, high, color="blue", alpha=0.1)
    top[1, 2].set(title="decision: probability of blue", xlabel="x", ylim=(0, 1))
    top[1, 2].legend()
    figure.savefig(out / "intervals.png", dpi=90)


if __name__ == "__main__":
    table1.main(TOY, ABLATIONS, figures, __doc__)
