"""Train many random starts of a tiny student as one batch, with cross-entropy, distillation or DiSK's Algorithm 1.

The starts' parameters are stacked along dimension 0 and every module is called once for all of them (``torch.func``):
students, and for DiSK one :class:`DiSKLoss` with a guide of its own per start, whose budget is that start's alone.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.functional import DiSKTerms

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 0.01  # appendices A.1 and A.2
PASSES = 3  # "We replace the arg min in the Algorithm 1 with three SGD steps over the entire dataset", A.5


class Problem(NamedTuple):
    """Inputs (N, D), labels (N,), the teacher's logits (N, C) and features (N, F)."""

    x: Tensor
    y: Tensor
    teacher_logits: Tensor
    teacher_features: Tensor


class Starts:
    """Modules of one class, stacked: parameters and buffers (S, ...)."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.count, self.module = len(modules), copy.deepcopy(modules[0])
        self.parameters, self.buffers = stack_module_state(modules)

    def __call__(self, *inputs: Any, in_dims: int | tuple[int | None, ...], method: str = "forward") -> Any:
        """Call every start's module on its slice of the inputs with in_dims 0, and on the whole of those with None."""
        caller = _Method(self.module, method)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *own: Any) -> Any:
            state = {f"module.{name}": value for name, value in (parameters | buffers).items()}
            return functional_call(caller, state, own)

        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(inputs)
        return vmap(one, in_dims=(0, 0, *dims))(self.parameters, self.buffers, *inputs)

    def train(self, mode: bool) -> "Starts":
        """Set the modules' mode, as nn.Module.train does."""
        self.module.train(mode)
        return self


class _Method(nn.Module):
    """Make another method of a module callable as its forward, which is what functional_call calls."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.module, self.method)(*inputs)


class Trained(NamedTuple):
    """The students, and what the guides last did to each sample: g and discount (S, N), None without a guide."""

    students: Starts
    guide: Tensor | None = None
    discount: Tensor | None = None


def train(
    make_student: Callable[[], nn.Module],
    problem: Problem,
    method: str,
    settings: dict[str, Any],
    *,
    starts: int,
    iterations: int,
    seed: int,
    batch_size: int | None = None,
    disk: dict[str, Any] | None = None,
) -> Trained:
    """Train ``starts`` students for ``iterations`` times three passes over the data each.

    Args:
        make_student: builds a student from torch's global random state.
        problem: the training data.
        method: "CE", "KD" or "DiSK".
        settings: ce_weight, temperature, student_temperature; for DiSK also top_k, multiplier (smallest, largest),
            budget and period.
        starts: S.
        iterations: R of Algorithm 1.
        seed: of the starts and of the order of samples: the same for every method.
        batch_size: samples of a gradient step, None for all.
        disk: what Algorithm 1 leaves open: hidden_dims, norm, inputs ("both", "logits", "features"), guide_lr,
            guide_gradient_scale.
    """
    torch.manual_seed(seed)
    students = Starts([make_student() for _ in range(starts)])
    optimizer = _sgd(students)
    batches = _batches(problem, batch_size, seed)
    steps = PASSES * -(-len(problem.y) // (batch_size or len(problem.y)))
    if method != "DiSK":
        weight = 1.0 if method == "CE" else settings["ce_weight"]
        temperatures = {key: settings[key] for key in ("temperature", "student_temperature") if key in settings}
        for _ in range(iterations * steps):
            x, y, teacher_logits, _ = next(batches)
            logits = students(x, in_dims=None)
            loss = functional.kd_loss(
                logits.flatten(0, 1),
                teacher_logits.repeat(starts, 1),
                y.repeat(starts),
                ce_weight=weight,
                distill_weight=1 - weight,
                **temperatures,
            )
            _step(optimizer, starts * loss)  # a mean over the starts, each of which wants its own
        return Trained(students)
    return _algorithm_1(students, optimizer, problem, batches, settings, disk or {}, iterations, steps)


def _algorithm_1(students, optimizer, problem, batches, settings, disk, iterations, steps) -> Trained:
    settings, disk = dict(settings), {"guide_lr": LEARNING_RATE, "guide_gradient_scale": None, **disk}
    multiplier, period = settings.pop("multiplier"), settings.pop("period")
    ce_weight = settings.pop("ce_weight")
    inputs, starts = disk.get("inputs", "both"), students.count
    losses = [
        DiSKLoss(
            GuideHead(
                problem.teacher_logits.shape[1],
                0 if inputs == "logits" else problem.teacher_features.shape[1],
                use_logits=inputs != "features",
                **{key: disk[key] for key in ("hidden_dims", "norm") if key in disk},
            ),
            ce_weight=ce_weight,
            distill_weight=1 - ce_weight,
            guide_gradient_scale=disk["guide_gradient_scale"],
            **settings,
        )
        for _ in range(starts)
    ]
    leader = losses[0]  # its multiplier is everyone's
    guided = Starts(losses)
    dual = DualScheduler(leader, epochs=iterations, multiplier=multiplier, period=min(period, iterations))
    guide_optimizer = _sgd(guided, disk["guide_lr"])

    def terms(logits: Tensor, batch) -> DiSKTerms:
        _, y, teacher_logits, features = batch
        features = None if inputs == "logits" else features
        return guided(logits, teacher_logits, y, features, in_dims=(0, None, None, None), method="terms")

    for _ in range(iterations):
        guided.buffers["multiplier"].fill_(leader.multiplier)
        for _ in range(steps):
            batch = next(batches)
            with torch.no_grad():
                logits = students(batch[0], in_dims=None)
            _step(guide_optimizer, terms(logits, batch).guide_loss.sum())
        for _ in range(steps):
            batch = next(batches)
            _step(optimizer, terms(students(batch[0], in_dims=None), batch).student_loss.sum())
        dual.step()
    with torch.no_grad():
        guided.train(False)
        logits = students(problem.x, in_dims=None)
        features = () if inputs == "logits" else (problem.teacher_features,)
        guide_logits = guided(problem.teacher_logits, *features, in_dims=None, method="guide_logits")
        discount = functional.discount(
            logits.transpose(1, 2),
            problem.teacher_logits.T.expand(starts, -1, -1),
            guide_logits,
            temperature=leader.temperature,
            student_temperature=leader.student_temperature,
            top_k=leader.top_k,
        )
    return Trained(students, guide_logits.sigmoid(), discount)


def student_loss(logits: Tensor, problem: Problem, settings: dict[str, Any], guide: Tensor | None) -> Tensor:
    """Return what one student minimises at these logits: KD's loss, or DiSK's with the guide's values (N,) held."""
    weight = settings["ce_weight"]
    temperatures = {key: settings[key] for key in ("temperature", "student_temperature") if key in settings}
    if guide is None:
        weights = {"ce_weight": weight, "distill_weight": 1 - weight}
        return functional.kd_loss(logits, problem.teacher_logits, problem.y, **weights, **temperatures)
    scaffold = functional.scaffolded_kl(
        logits, problem.teacher_logits, guide.logit(), top_k=settings["top_k"], **temperatures
    )
    return weight * F.cross_entropy(logits, problem.y) + (1 - weight) * scaffold


def _sgd(stacked: Starts, lr: float = LEARNING_RATE) -> torch.optim.SGD:
    parameters = stacked.parameters.values()
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _batches(problem: Problem, batch_size: int | None, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches, each epoch in a new order; all samples at once where batch_size is None."""
    generator = torch.Generator().manual_seed(seed)
    count = len(problem.y)
    while batch_size is None:
        yield tuple(problem)
    while True:
        for index in torch.randperm(count, generator=generator).split(batch_size):
            yield tuple(part[index] for part in problem)
