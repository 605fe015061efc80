"""Table 1, 1D intervals: from how many of 100 random starts does a one-interval student find the global minimum?

Blue points lie in [2, 3] and [5, 7] of [0, 9], the teacher has two intervals and the student one (appendix A.1). The
student's minima are A = [2, 3], B = [2, 7] and C = [5, 7], which the paper calls global; "elsewhere" is none of them.
What the paper leaves open is fixed here: the student's parameters are its interval's start and width, each between 0
and 9; it starts at a ~ U(0, 3), b ~ U(3, 9); the slope kappa is 7 and .003 is added to both probabilities, so that the
loss is bounded (both chosen with DiSK's counts in view, on other starts); the teacher has the true ends; full-batch
gradient steps. KD's settings are frozen in results/intervals_search.json (``--search``).

Usage: python examples/intervals.py [--dry-run] [--search | --ablate] [--out DIR]
"""

import functools
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from toys import rows, table1, tables
from toys.starts import Problem, Starts
from toys.training import Trained, student_loss

KAPPA, OFFSET, WIDTH, SAMPLES = 7.0, 0.003, 9.0, 1000
BLUE = ((2.0, 3.0), (5.0, 7.0))
MINIMA = {"A [2, 3]": (2.0, 3.0), "B [2, 7]": (2.0, 7.0), "C [5, 7], global": (5.0, 7.0)}
REACH = 1.0  # a start belongs to a minimum if both ends are within this distance


class Intervals(nn.Module):
    """A sum of soft intervals sigmoid(kappa (x - a)) - sigmoid(kappa (x - a - width)), given by their ends (I, 2)."""

    def __init__(self, ends: Tensor, kappa: float = KAPPA) -> None:
        super().__init__()
        self.kappa = kappa
        self.place = nn.Parameter(torch.stack([ends[:, 0], ends[:, 1] - ends[:, 0]], 1))

    def features(self, x: Tensor) -> Tensor:
        """Return each interval's value: (N,) -> (N, I)."""
        low, high = to_ends(self.place).unbind(1)
        return torch.sigmoid(self.kappa * (x[:, None] - low)) - torch.sigmoid(self.kappa * (x[:, None] - high))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of red and blue, log-probabilities but for the offset: (N,) -> (N, 2)."""
        blue = self.features(x).sum(1)
        return torch.stack([(1 - blue + OFFSET).log(), (blue + OFFSET).log()], 1)


def to_ends(place: Tensor) -> Tensor:
    """Convert start and width to both ends, (..., 2)."""
    low, width = place.unbind(-1)
    return torch.stack([low, low + width], -1)


def random_ends() -> Tensor:
    """Ends of a random start, (1, 2)."""
    return torch.stack([3 * torch.rand(1), 3 + 6 * torch.rand(1)], 1)


def is_blue(x: Tensor) -> Tensor:
    """Return each point's label."""
    return torch.stack([(low < x) & (x < high) for low, high in BLUE]).any(0)


def sample(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points, half of them blue."""
    generator = torch.Generator().manual_seed(1000 + seed)
    pool = WIDTH * torch.rand(20 * count, generator=generator)
    blue = is_blue(pool)
    x = torch.cat([pool[blue][: count // 2], pool[~blue][: count - count // 2]])
    return x, is_blue(x).long()


@functools.cache
def problem(seed: int, kappa: float = KAPPA) -> Problem:
    """Return training data and the teacher's outputs on them; its features are the values of its two intervals."""
    x, y = sample(SAMPLES, seed)
    teacher = Intervals(torch.tensor(BLUE), kappa)
    with torch.no_grad():
        return Problem(x, y, teacher(x), teacher.features(x))


def ends_of(students: Starts) -> Tensor:
    """Return both ends of every student's interval, (S, 2)."""
    return to_ends(students.parameters["place"].detach()[:, 0])


def classify(students: Starts, _problem: Problem, _seed: int) -> Tensor:
    """Return the nearest minimum of each start, by the interval's ends."""
    distance = (ends_of(students)[:, None] - torch.tensor(list(MINIMA.values()))).abs().amax(2)
    nearest = distance.min(1)
    return torch.where(nearest.values < REACH, nearest.indices + 1, 0)


PERIOD = 50
LONG = {"iterations": 334}  # CE and KD: 1,002 steps
SCAFFOLD = {"ce_weight": 0.0, "temperature": 4.0, "student_temperature": 4.0, "top_k": 1}
GUIDE = {"hidden_dims": [8], "norm": "batch", "initial": 0.95, "lr": 0.001, "weight_decay": 0.1}


def make_toy(kappa: float = KAPPA, batch_size: int | None = None) -> table1.Toy:
    """Return the problem, with what the paper leaves open as arguments."""
    return table1.Toy(
        name="intervals",
        title="1D intervals",
        minima=("elsewhere", *MINIMA),
        paper={
            method: dict(zip(MINIMA, counts, strict=True))
            for method, counts in {rows.CE: (35, 64, 1), rows.KD: (30, 67, 3), rows.DISK: (9, 1, 90)}.items()
        },
        make_student=lambda: Intervals(random_ends(), kappa),
        make_problem=lambda seed: problem(seed, kappa),
        classify=classify,
        rows={
            rows.CE: {"ce_weight": 1.0, **LONG},
            rows.KD_PLAIN: {"ce_weight": 0.0, "temperature": 1.0, **LONG},
            rows.KD: None,
            rows.DISK: {**SCAFFOLD, "multiplier": [0.1, 50.0], "period": PERIOD, "budget": 0.0, "guide": GUIDE},
            rows.UNIFORM: {**SCAFFOLD, "ramp": [PERIOD, 0.5]},
        },
        trials={rows.KD: [{**settings, **LONG} for settings in rows.grid(rows.KD_RANGES)]},
        iterations=200,
        batch_size=batch_size,
        bounds=(0.0, WIDTH),
    )


TOY = make_toy()
CHANGES: dict[str, dict[str, Any]] = {  # of DiSK's settings
    "K = 2": {"top_k": 2},
    "both temperatures 1": {"temperature": 1.0, "student_temperature": 1.0},
    "both temperatures 2": {"temperature": 2.0, "student_temperature": 2.0},
    "student's temperature 1": {"student_temperature": 1.0},
    "cross-entropy weight .1": {"ce_weight": 0.1},
    "cross-entropy weight .5": {"ce_weight": 0.5},
    "multiplier up to 10": {"multiplier": [0.1, 10.0]},
    "multiplier up to 1000": {"multiplier": [0.1, 1000.0]},
    "guide starts at .5": {"guide.initial": 0.5},
    "guide starts at .05": {"guide.initial": 0.05},
    "guide reads features alone": {"guide.inputs": "features"},
}
ABLATIONS: dict[str, table1.Ablation] = {
    "as reported": table1.Ablation(TOY, {}),
    "kappa 5": table1.Ablation(make_toy(kappa=5.0), {}),
    "kappa 10": table1.Ablation(make_toy(kappa=10.0), {}),
    "minibatches of 200": table1.Ablation(make_toy(batch_size=200), {}, (rows.DISK,)),
    **{name: table1.Ablation(TOY, changes, (rows.DISK,)) for name, changes in CHANGES.items()},
}


def describe(_results: dict[str, Any], trained: dict[str, Trained]) -> dict[str, Any]:
    """Return how close together the starts get while the multiplier is small, and the final g: is the start erased?"""
    x, guide = problem(table1.REPORT_SEEDS[0]).x, trained[rows.DISK].guide
    found: dict[str, Any] = {"g_at_the_end": {}}
    for low, high in ((0.0, 2.0), (2.0, 3.0), (3.0, 5.0), (5.0, 7.0), (7.0, 9.0)):
        found["g_at_the_end"][f"[{low:.0f}, {high:.0f}]"] = guide[:, (low < x) & (x < high)].mean().item()
    for row in (rows.KD_PLAIN, rows.DISK, rows.UNIFORM):
        ends = to_ends(trained[row].path[: PERIOD // 2 + 1])  # (iterations, S, 2)
        low, high = ends.quantile(torch.tensor([0.1, 0.9]), 1)
        width = (high - low).mean(1)
        nearest = int(width.argmin())
        found[row] = {
            "middle_80_percent_at_the_start": width[0].item(),
            "narrowest": width[nearest].item(),
            "iteration": nearest,
            "median_ends_there": ends[nearest].median(0).values.tolist(),
        }
    found["kd_from_there"] = kd_from(trained[rows.DISK].path[found[rows.DISK]["iteration"]])
    return {"continuation": found}


def kd_from(places: Tensor) -> dict[str, int]:
    """Count the minima of plain KD on the first set, started from these parameters (S, 2)."""
    seed, made = table1.REPORT_SEEDS[0], iter(to_ends(places))
    continued = TOY._replace(make_student=lambda: Intervals(next(made)[None]))
    trained = table1.run(continued, TOY.rows[rows.KD_PLAIN], starts=len(places), seed=seed)
    return dict(zip(TOY.minima, table1.counts(TOY, trained, seed), strict=True))


def remarks(results: dict[str, Any]) -> str:
    """Return the result of :func:`describe` as a table, with the guide's g below it."""
    lines = [
        "| first set | ends of the middle 80 % of starts span | at most narrowed to | at iteration | median a, b |"
    ]
    lines.append("|---|---|---|---|---|")
    found = results["continuation"]
    for row in (rows.KD_PLAIN, rows.DISK, rows.UNIFORM):
        each, (low, high) = found[row], found[row]["median_ends_there"]
        spans = f"{each['middle_80_percent_at_the_start']:.2f} | {each['narrowest']:.2f} | {each['iteration']}"
        lines.append(f"| {row} | {spans} | {low:.1f}, {high:.1f} |")
    shown = ", ".join(f"{where} {value:.2f}" for where, value in found["g_at_the_end"].items())
    kd = " / ".join(str(count) for count in found["kd_from_there"].values())
    where = f"Plain KD from where DiSK's starts are then: {kd} in {' / '.join(found['kd_from_there'])}."
    return "\n".join([*lines, "", f"{where} DiSK's mean g at the end: {shown}."])


def surface(settings: dict[str, Any], data: Problem, guide: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a grid of ends and the student's mean loss there; ``guide`` (N,) is held fixed."""
    grid = torch.linspace(0, WIDTH, 61)
    losses = torch.full((len(grid), len(grid)), float("nan"))
    for i, low in enumerate(grid):
        for j in range(i + 1, len(grid)):
            with torch.no_grad():
                logits = Intervals(torch.stack([low, grid[j]])[None])(data.x)
                losses[i, j] = student_loss(logits, data, settings, guide)
    return grid, losses


def figures(toy: table1.Toy, results: dict[str, Any], trained: dict[str, Trained], out: Path) -> None:
    """Draw loss surfaces with all end points, the counts, the trajectories of the ends, and g over the data."""
    data, disk = problem(table1.REPORT_SEEDS[0]), trained[rows.DISK]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    top = figure.subplots(2, 3)
    guide = disk.guide.mean(0).clamp(1e-6, 1 - 1e-6)
    for axes, row, held in ((top[0, 0], rows.KD, None), (top[0, 1], rows.DISK, guide)):
        grid, losses = surface(results["rows"][row]["settings"], data, held)
        image = axes.contourf(grid, grid, losses.T, levels=30, cmap="viridis")
        axes.scatter(*ends_of(trained[row].students).T, s=10, color="red", label="ends of the starts")
        for name, (low, high) in MINIMA.items():
            axes.annotate(name[0], (low, high), color="white", weight="bold")
        axes.set(title=f"{row}: loss at the end", xlabel="a", ylabel="b", xlim=(0, WIDTH), ylim=(0, WIDTH))
        axes.legend(loc="lower right")
        figure.colorbar(image, ax=axes)
    tables.bars(top[0, 2], toy, results)
    for axes, row in ((top[1, 0], rows.DISK), (top[1, 1], rows.UNIFORM)):
        for end, colour in ((0, "tab:blue"), (1, "tab:orange")):
            axes.plot(to_ends(trained[row].path)[..., end], color=colour, alpha=0.15)
        axes.set(title=f"{row}: a, b of all starts", xlabel="iteration", ylim=(0, WIDTH))
    axes, order = top[1, 2], data.x.argsort()
    axes.plot(data.x[order], disk.guide[:, order].mean(0), color="black")
    axes.fill_between(data.x[order], *disk.guide[:, order].quantile(torch.tensor([0.1, 0.9]), 0), alpha=0.3)
    axes.set(title="g at the end: mean, middle 80 %", xlabel="x", ylabel="g", ylim=(0, 1))
    for low, high in BLUE:
        axes.axvspan(low, high, color="blue", alpha=0.1)
    figure.savefig(out / "intervals.png", dpi=90)


if __name__ == "__main__":
    table1.main(TOY, table1.Study(ABLATIONS, describe, remarks, figures), __doc__)
