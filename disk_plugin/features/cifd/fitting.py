"""Stage A of CIFD: rate-distortion modules trained on a teacher's embeddings, in parallel. Eq. (4), (5), appendix A."""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ... import _checks
from ..._collectives import average_gradients, mean_over_processes
from ..._progress import progress_bar
from .distances import DISTORTIONS, REDUCTIONS
from .embeddings import CachedEmbeddings, Embeddings, Rows, to_embeddings
from .modules import RateDistortionModule
from .seeding import seed_generators, seeded
from .stage_a import stage_a_loss

_DENSITY_RATE = 5.0  # of the densities' learning rate to the networks': at 1 they lag behind what they charge


def fit_rdms(
    source: Any,
    *,
    teacher: nn.Module | None = None,
    targets: Tensor | None = None,
    modules: RateDistortionModule | None = None,
    distortion_weights: Sequence[float] = (1e4, 5e3, 1e3),
    reduction: str = "mean",
    distortion: str = "smooth_l1",
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 2.0,
    epochs: int = 30,
    lr: float = 2e-3,
    batch_size: int = 256,
    held_out: float = 0.05,
    hidden_dim: int | None = None,
    nonnegative: bool | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    shared: bool = False,
    progress: bool = True,
) -> RateDistortionModule:
    """Train rate-distortion modules on a teacher's embeddings: CIFD's stage A, before the student's training.

    All modules are trained in one pass, by Adam with a rate that falls to 0 as a cosine (ours; the paper does not say).
    The teacher runs once, or not at all with a cache. Random numbers are the call's own.

    Args:
        source: a ``TeacherCache`` with features, an iterable of (x, target), or ``Embeddings``.
        teacher: of an iterable: the model whose last Linear's input are the embeddings, or ``with_features`` of it.
        targets: of a cache: class indices of its samples, (N,).
        modules: trained further instead of new ones; with it ``distortion_weights``, ``hidden_dim`` and ``nonnegative``
            are ignored.
        distortion_weights: R of each module, > 0. The paper's 1e4, 5e3, 1e3 (ImageNet) go with ``reduction="mean"``,
            its 1.0, 0.8, 0.6 (CIFAR-100) with ``"sum"`` (ours, see ``reduction``).
        reduction: of the distortion over the embedding's width, ``"mean"`` or ``"sum"``; the paper does not say which.
        distortion: ``"smooth_l1"`` or ``"mse"``, the squared distance.
        ce_weight: of the cross-entropy, >= 0.
        kl_weight: of the divergence from the teacher, >= 0.
        temperature: T of the divergence, > 0.
        epochs: passes over the embeddings.
        lr: Adam's, of the networks; the densities learn 5 times as fast.
        batch_size: samples per step.
        held_out: share of the samples on which the report is measured, in (0, 0.5].
        hidden_dim: see ``RateDistortionModule``.
        nonnegative: see ``RateDistortionModule``; None to look at the embeddings.
        seed: of initial values, order and noise.
        device: to train on; None for the CPU, or where ``modules`` are.
        shared: average the gradients of all processes, each with a part of the samples; then every one must call it.
        progress: show a bar if tqdm is installed.

    Returns:
        The modules, frozen and in evaluation mode, in which they round; their ``report`` has the rate (nats), the
        distortion and the accuracy (percent) of each, and the teacher's, on the held-out samples.

    Raises:
        ValueError: values out of range; embeddings that are not finite; a cache without features; modules for another
            width or number of classes, or that diverged.
        TypeError: a source of another kind, or an iterable without ``teacher``.

    Warns:
        UserWarning: a module is less accurate than one with a smaller R, as with the wrong ``reduction``.

    Examples:
        >>> modules = fit_rdms(
        ...     Embeddings(torch.rand(64, 8)), distortion_weights=(100.0, 10.0), epochs=1, progress=False
        ... )
        >>> len(modules), modules.training, sorted(modules.report)
        (2, False, ['accuracy', 'distortion', 'rate', 'samples', 'teacher_accuracy'])
    """
    _checks.choice("distortion", distortion, DISTORTIONS)
    _checks.choice("reduction", reduction, REDUCTIONS)
    for name, value in {"ce_weight": ce_weight, "kl_weight": kl_weight}.items():
        _checks.number(name, value, at_least=0)
    for name, value in {"temperature": temperature, "lr": lr}.items():
        _checks.number(name, value, above=0)
    _checks.number("held_out", held_out, above=0, at_most=0.5)
    for name, count in {"epochs": epochs, "batch_size": batch_size}.items():
        _checks.integer(name, count, at_least=1)
    given, embeddings = modules, to_embeddings(source, teacher, targets, progress)
    probe = embeddings.read(torch.arange(min(len(embeddings), batch_size)), 0)
    dim, classes = probe.features.shape[1], 0 if probe.logits is None else probe.logits.shape[1]
    place = torch.device(device) if device is not None else _device_of(modules)
    with seeded(seed, place):
        if modules is None:
            relu = bool((probe.features >= 0).all()) if nonnegative is None else nonnegative
            shape: dict[str, Any] = {"hidden_dim": hidden_dim, "nonnegative": relu}
            modules = RateDistortionModule(dim, classes, distortion_weights=distortion_weights, **shape)
        if (modules.dim, modules.num_classes) != (dim, classes):
            raise ValueError(
                f"the modules are for embeddings of width {modules.dim} and {modules.num_classes} classes, got width "
                f"{dim} and {classes} classes"
            )
        dtype = next(modules.parameters()).dtype  # of a host's models, maybe half precision
        modules.to(device=place, dtype=probe.features.dtype).requires_grad_(True)
        weights = {"ce_weight": ce_weight, "kl_weight": kl_weight, "temperature": temperature}
        settings: dict[str, Any] = {"kind": distortion, "reduction": reduction, **weights}
        fit = _Fit(modules, embeddings, settings, held_out, seed, shared)
        fit.train(epochs, lr, batch_size, progress)
        modules.requires_grad_(False).eval()
        report = fit.measured(batch_size, reduction)
        if given is not None:
            modules.to(dtype)
        modules.report = report
    return modules


def _device_of(modules: RateDistortionModule | None) -> torch.device:
    return torch.device("cpu") if modules is None else next(modules.parameters()).device


class _Fit:
    """The modules' training: their samples, steps and report."""

    def __init__(
        self,
        modules: RateDistortionModule,
        embeddings: Embeddings | CachedEmbeddings,
        settings: dict[str, Any],
        held_out: float,
        seed: int,
        shared: bool,
    ) -> None:
        self.modules, self.embeddings, self.settings = modules, embeddings, settings
        self.shared = shared and dist.is_available() and dist.is_initialized()
        self.generator = torch.Generator().manual_seed(seed)
        if self.shared:
            for tensor in (*modules.parameters(), *modules.buffers()):
                dist.broadcast(tensor.detach(), 0)
            seed_generators(seed + 1 + dist.get_rank(), next(modules.parameters()).device)  # of the noise
        samples = self._samples()
        order = torch.randperm(samples, generator=self.generator)
        left_out = min(max(round(held_out * samples), 1), samples - 1)
        if left_out < 1:
            raise ValueError(f"fitting needs samples to train on and to hold out, got {samples}")
        self.held_out, self.seen = order[:left_out], order[left_out:]

    def _samples(self) -> int:
        """Return the number of samples to use: as many steps in every process."""
        samples = torch.tensor(len(self.embeddings), device=next(self.modules.parameters()).device)
        if self.shared:
            dist.all_reduce(samples, dist.ReduceOp.MIN)
        return int(samples)

    def train(self, epochs: int, lr: float, batch_size: int, progress: bool) -> None:
        modules = self.modules.train()
        density = list(modules.density.parameters())
        others = [parameter for name, parameter in modules.named_parameters() if not name.startswith("density.")]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": density, "lr": _DENSITY_RATE * lr}]
        optimizer = torch.optim.Adam(groups, lr)
        steps = -(-len(self.seen) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        for epoch in progress_bar(range(epochs), progress, "rate-distortion modules"):
            order = self.seen[torch.randperm(len(self.seen), generator=self.generator)]
            for index in torch.split(order, batch_size):
                loss, _ = stage_a_loss(modules, self._rows(index, epoch), **self.settings)
                optimizer.zero_grad()
                # neither the modules' gradients nor Adam's steps mix
                torch.autograd.backward(loss.total.mean(1).sum())
                if self.shared:
                    average_gradients(modules.parameters())
                optimizer.step()
                schedule.step()

    @torch.no_grad()
    def measured(self, batch_size: int, reduction: str) -> dict[str, Any]:
        """Return the report on the held-out samples; warn if accuracy falls where R rises."""
        found: list[list[Tensor]] = []
        for index in torch.split(self.held_out, batch_size):
            rows = self._rows(index, 0)
            loss, logits = stage_a_loss(self.modules, rows, **self.settings)
            found.append([loss.rate, loss.distortion])
            if logits is not None and rows.target is not None and rows.logits is not None:
                label = rows.target if rows.target.ndim == 1 else rows.target.argmax(1)
                found[-1] += [logits.argmax(2) == label, (rows.logits.argmax(1) == label).unsqueeze(0)]
        rate, distance, *right = (torch.cat(column, 1) for column in zip(*found, strict=True))
        weights, finite = self.modules.distortion_weights, (rate + distance).isfinite().all(1).tolist()
        if not all(finite):
            raise ValueError(
                f"modules diverged, R = {[each for each, fine in zip(weights, finite, strict=True) if not fine]}: rate "
                f"or distortion is not finite. Give a smaller lr, or the reduction of these R, got {reduction!r}"
            )
        if right:
            self._warn_if_accuracy_falls(right[0], reduction)
        own, teachers = [100 * self._mean(each) for each in right] if right else (None, None)
        return {
            "rate": self._mean(rate).tolist(),
            "distortion": self._mean(distance).tolist(),
            "accuracy": None if own is None else own.tolist(),
            "teacher_accuracy": None if teachers is None else float(teachers),
            "samples": len(self.held_out),
        }

    def _mean(self, value: Tensor) -> Tensor:
        mean = value.double().mean(1)
        return mean_over_processes(mean) if self.shared else mean

    def _warn_if_accuracy_falls(self, right: Tensor, reduction: str) -> None:
        """Compare neighbours in R on the same samples: a fall of two standard errors is no chance."""
        weights = self.modules.distortion_weights
        order = sorted(range(len(weights)), key=weights.__getitem__)
        for low, high in pairwise(order):
            lost, gained = ((right[a] & ~right[b]).sum().item() for a, b in ((low, high), (high, low)))
            if lost - gained > 2 * (lost + gained) ** 0.5:
                accuracies = [100 * right[i].double().mean().item() for i in (low, high)]
                warnings.warn(
                    f"the module with R = {weights[high]:g} is less accurate than that with R = {weights[low]:g}, "
                    f"{accuracies[1]:.1f} to {accuracies[0]:.1f} %, and should be more: is reduction={reduction!r} the "
                    f"one that these R are for? Those of the paper near 1 are for 'sum', those from 1e3 on for 'mean'",
                    stacklevel=5,
                )

    def _rows(self, index: Tensor, epoch: int) -> Rows:
        device = next(self.modules.parameters()).device
        rows = self.embeddings.read(index, epoch)
        return Rows(*(None if value is None else value.to(device) for value in rows))  # type: ignore[arg-type]
