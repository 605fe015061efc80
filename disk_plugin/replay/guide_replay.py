"""Algorithm 1's guide passes on a record of the student's passes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._collectives import Group
from .._modes import in_mode, without_autocast
from ..distributed import average_gradients, mean_over_processes, share_student_temperature
from ..loss import DiSKLoss
from .record import get_loss, get_rows
from .reservoir import Reservoir

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class GuideReplay:
    r"""Algorithm 1, Kag et al. (ICLR 2023), without its extra passes over the data.

    Algorithm 1 trains the guide with the student fixed, in extra passes of teacher and student. The guide's objective
    is, eq. (5):

    $$(1-\alpha)\,L_{dist}(s, g) + \lambda\,\Big(\tfrac1N\sum_i g_i CE_i - \delta\Big)_+$$

    It needs only the guide's input, t_k and log s_k of the classes that receive g, and the budget's CE. These are
    recorded while the student trains. ``train_guide`` then makes the guide's passes on the record, without teacher,
    student or images. For a fixed student, value and gradient are those of ``disk.terms(...).guide_loss``; a student in
    training has changed slightly since recording. Temperatures are those at recording, ``multiplier`` and ``budget``
    those in ``train_guide``: call ``dual.step()`` before it, as the guide of Algorithm 1 trains under the multiplier of
    the student's passes that follow.

    **Memory.** A sample takes ``itemsize * (L + D + 2 K) + 17`` bytes (33 for float64): L = C if the guide reads
    logits, else 0; D its features; K = ``top_k`` (one more in the official variants), or C. 100 classes with 256
    features take 2,241 bytes, 112 MB for 50,000 samples, half of it in float16. With many classes use ``top_k`` and
    ``GuideHead(use_logits=False)``: 1,000 classes, 2,048 features and ``top_k=20`` take 4,193 bytes in float16. With
    dense logits, read pixels for samples here.

    Ignored targets and samples that are not finite are left out, which synchronizes with the device once per batch.

    **Several ranks.** Each records its own samples. Gradients are averaged over ranks, which make the same number of
    steps: start from the same guide on all (``disk_plugin.distributed.attach``) and record something on each. A fitted
    student temperature is averaged in each ``student_loss``, which all ranks must then call equally often. A guide with
    BatchNorm needs two samples per step and rank.

    Args:
        disk: the loss that owns the guide, unwrapped.
        optimizer: of the guide's parameters only; the student's optimizer must not hold them.
        capacity: samples held, >= 1; of more, a uniform sample is kept, see ``disk_plugin.replay.Reservoir``.
        batch_size: samples in a step of the guide, >= 1; the hinge is over these. A pass is split evenly, so that its
            last batch is no smaller than the others.
        dtype: storage type, float16, bfloat16, float32 or float64; half precision is upcast to float32 when read.
        seed: of the order of the passes and the choice of samples; the global generator is not used.
        process_group: the ranks that train one guide; None for all.

    Raises:
        ValueError: values out of range; an optimizer of parameters other than the guide's.
        TypeError: ``disk`` is not a ``DiSKLoss``; values of another type.

    Examples:
        >>> import torch
        >>> from disk_plugin import DiSKLoss, GuideHead
        >>> disk = DiSKLoss(GuideHead(num_classes=10))
        >>> replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1))
        >>> student_logits = torch.randn(8, 10, requires_grad=True)
        >>> replay.student_loss(student_logits, torch.randn(8, 10), torch.arange(8)).backward()
        >>> len(replay), len(replay.train_guide(passes=3))
        (8, 3)
    """

    def __init__(
        self,
        disk: DiSKLoss,
        optimizer: torch.optim.Optimizer,
        *,
        capacity: int = 50_000,
        batch_size: int = 200,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        process_group: Group = None,
    ) -> None:
        if not isinstance(disk, DiSKLoss):
            raise TypeError(f"disk must be a DiSKLoss (not a wrapper around it), got {type(disk).__name__}")
        _check_optimizer(optimizer, disk.guide)
        _checks.integer("capacity", capacity, at_least=1)
        _checks.integer("batch_size", batch_size, at_least=1)
        _checks.integer("seed", seed, at_least=0)
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {list(_DTYPES)}, got {dtype!r}")
        self.disk, self.optimizer, self.batch_size, self.dtype = disk, optimizer, batch_size, dtype
        self.generator, self.process_group = torch.Generator().manual_seed(int(seed)), process_group
        self._record = Reservoir(capacity, self.generator)

    def __len__(self) -> int:
        return len(self._record)

    def student_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        teacher_features: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Record the batch and return ``disk.terms(...).student_loss``, which has no gradient for the guide.

        Arguments and shapes are those of ``disk.terms``. The guide runs in evaluation mode. After ``disk.eval()``
        nothing is recorded.
        """
        with torch.no_grad(), in_mode(self.disk.guide, training=False):
            guide_logits = self.disk.guide_logits(teacher_logits, teacher_features, target=target)
        terms = self.disk.terms(
            student_logits, teacher_logits, target, guide_logits=guide_logits, sample_weight=sample_weight
        )
        if self.disk.training:
            if self.disk.reduce_mean is None:  # which has averaged it
                share_student_temperature(self.disk, self.process_group)
            self.record(student_logits, teacher_logits, target, teacher_features, sample_weight=sample_weight)
        return terms.student_loss

    def record(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        teacher_features: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> None:
        """Record a batch whose loss is evaluated elsewhere; arguments and shapes are those of ``disk.terms``.

        Pixels of dense logits are recorded individually, so the guide has to treat them independently, as ``GuideHead``
        does. With logits (N, C), features may have any shape (N, ...).
        """
        rows = get_rows(self.disk, student_logits, teacher_logits, target, teacher_features, sample_weight, self.dtype)
        self._record.add(rows)

    @torch.enable_grad()
    def train_guide(self, passes: int = 3, *, clear: bool = True) -> list[float]:
        """Train the guide on the record, reshuffled for each pass; return each pass's mean loss.

        The guide is in training mode during these passes. Its learning rate is the optimizer's: use a scheduler.

        Args:
            passes: number of passes over the record, >= 1 (paper: 3).
            clear: whether to clear the record afterwards.

        Raises:
            RuntimeError: nothing is recorded.
        """
        _checks.integer("passes", passes, at_least=1)
        steps, losses = self._steps(), []
        weight = next(self.disk.guide.parameters())
        with in_mode(self.disk.guide, training=True), without_autocast(weight):  # autocast would affect backward too
            for _ in range(passes):
                order = torch.randperm(len(self), generator=self.generator).to(weight.device)
                losses.append(torch.stack([self._step(index) for index in order.tensor_split(steps)]).mean())
        self.optimizer.zero_grad()
        for buffer in self.disk.guide.buffers():
            if buffer.is_floating_point():  # BatchNorm's statistics, which differ between ranks
                buffer.copy_(self._mean(buffer))
        if clear:
            self.clear()
        means: list[float] = self._mean(torch.stack(losses)).tolist()
        return means

    def guide_loss(self, index: Tensor) -> Tensor:
        """Return the guide's loss, a scalar with its gradient, of the recorded samples ``index``, int64 (B,)."""
        return get_loss(self.disk, self._record.rows(index))

    def clear(self) -> None:
        """Clear the record; its memory stays allocated."""
        self._record.clear()

    @property
    def bytes_per_sample(self) -> int:
        """Bytes per recorded sample.

        Raises:
            RuntimeError: nothing is recorded yet, so the widths are unknown.
        """
        if not self._record.bytes_per_row:
            raise RuntimeError("bytes_per_sample is known from the first recorded batch on, got none yet")
        return self._record.bytes_per_row

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer, generator and the record, which is empty after ``train_guide``; the guide is the loss's."""
        generator = self.generator.get_state()
        return {"optimizer": self.optimizer.state_dict(), "generator": generator, **self._record.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state, bit for bit.

        Raises:
            RuntimeError: entries missing or unknown, a record of another capacity or dtype.
        """
        if set(state) != set(self.state_dict()):
            raise RuntimeError(f"expected a state with {sorted(self.state_dict())}, got {sorted(state)}")
        stored = state["rows"]["target"].dtype if state["rows"] else self.dtype
        if stored != self.dtype:
            raise RuntimeError(f"expected a record of dtype {self.dtype}, got {stored}: give dtype={stored}")
        self.optimizer.load_state_dict(state["optimizer"])
        self._record.load_state_dict(state, next(self.disk.guide.parameters()).device)
        self.generator.set_state(state["generator"].cpu())

    def _mean(self, value: Tensor) -> Tensor:
        return mean_over_processes(value, self.process_group)

    def _steps(self) -> int:
        """Return the steps of a pass, by the mean record length, as every rank has to make the same number."""
        device = next(self.disk.guide.parameters()).device
        mean = self._mean(torch.tensor(float(len(self)), device=device)).item()
        if not mean:
            raise RuntimeError(
                "train_guide() needs recorded positions, got none: call student_loss() or record() first"
            )
        return math.ceil(mean / self.batch_size)

    def _step(self, index: Tensor) -> Tensor:
        """Make an optimizer step of the guide; return its loss."""
        loss = self.guide_loss(index)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(self.disk.guide.parameters(), self.process_group)
        self.optimizer.step()
        return loss.detach()


def _check_optimizer(optimizer: torch.optim.Optimizer, guide: nn.Module) -> None:
    """Raise ValueError if the optimizer holds other parameters or lacks trainable ones of the guide."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    own = set(guide.parameters())
    missing = {parameter for parameter in own if parameter.requires_grad} - held
    if missing or held - own:
        raise ValueError(
            f"optimizer must hold the guide's parameters and no others, got {len(held - own)} others and "
            f"{len(missing)} of the guide's missing"
        )
