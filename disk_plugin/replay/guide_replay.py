"""Algorithm 1's guide passes on what was recorded during the student's passes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._modes import in_mode, without_autocast
from ..distributed import Group, average_gradients, mean_over_processes, share_student_temperature
from ..loss import DiSKLoss
from .record import loss_of, rows_of
from .reservoir import Reservoir

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class GuideReplay:
    r"""Algorithm 1, Kag et al. (ICLR 2023), without its extra passes over the data.

    There the guide is trained with the student fixed, in passes that run teacher and student once more. Its objective,

    .. math:: (1-\alpha)\,L_{dist}(s, g) + \lambda\,\Big(\tfrac1N\sum_i g_i CE_i - \delta\Big)_+

    reads of them only the guide's input, t_k and log s_k on the scaffolded classes and the budget's CE. These are
    recorded while the student trains; ``train_guide`` makes the guide's passes on the record, touching neither teacher
    nor student nor images. On a fixed student, value and gradient are those of ``disk.terms(...).guide_loss``; a
    student that trains has moved on a little since its samples were recorded. Temperatures are those in force when a
    position was recorded, ``multiplier`` and ``budget`` those in force in ``train_guide``: call ``dual.step()`` before
    it, as Algorithm 1's guide trains under the multiplier of the student's passes that follow.

    A position takes ``itemsize * (L + D + 2 K) + 17`` bytes (33 for float64): L = C if the guide reads
    logits, else 0; D its features; K = ``top_k`` (one more in the official variants), or C. 100 classes with 256
    features take 2,241 bytes, 112 MB for 50,000 samples, half of it in float16. With many classes use ``top_k`` and
    ``GuideHead(use_logits=False)``: 1,000 classes, 2,048 features and ``top_k=20`` take 4,193 bytes in float16.

    Positions under ``ignore_index``, and those with values that are not finite, are left out, which waits for the
    device once per batch. In several processes each records its own positions; gradients are averaged over processes,
    which make the same number of steps: begin with the same guide on all (:func:`disk_plugin.distributed.attach`), and
    let each record something. A fitted student temperature is shared in each ``student_loss``, which all must
    then call equally often. A guide with BatchNorm needs two positions per step and process.

    Args:
        disk: the loss that owns the guide, unwrapped.
        optimizer: of the guide's parameters, and no others; the student's must not hold them.
        capacity: positions held, >= 1; of more a uniform sample, see :class:`disk_plugin.replay.Reservoir`.
        batch_size: positions in a step of the guide, >= 1, over which the hinge is. A pass is split evenly, so that
            its last batch is no smaller than the others.
        dtype: of what is stored, float16, bfloat16, float32 or float64; computed is in float32 at least.
        seed: of the order of the passes and the choice of positions: the global generator is left alone.
        process_group: the processes that train one guide; None for all.

    Raises:
        ValueError: values out of range, an optimizer of other parameters than the guide's.
        TypeError: ``disk`` is not a ``DiSKLoss``, values of another type.

    Example:
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
        """Return ``disk.terms(...).student_loss``, which does not reach the guide, and record the batch.

        The guide is evaluated in its evaluation mode. With ``disk.eval()`` nothing is recorded.
        """
        with torch.no_grad(), in_mode(self.disk.guide, training=False):
            guide_logits = self.disk.guide_logits(teacher_logits, teacher_features, target=target)
        terms = self.disk.terms(
            student_logits, teacher_logits, target, guide_logits=guide_logits, sample_weight=sample_weight
        )
        if self.disk.training:
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

        Positions of dense logits are recorded one by one, so that the guide has to treat each by itself, as
        ``GuideHead`` does. Beside logits (N, C), features of any shape (N, ...) will do.
        """
        rows = rows_of(self.disk, student_logits, teacher_logits, target, teacher_features, sample_weight, self.dtype)
        self._record.add(rows)

    @torch.enable_grad()
    def train_guide(self, passes: int = 3, *, clear: bool = True) -> list[float]:
        """Pass over the record with the guide's optimizer, in a new order each time; return each pass's mean loss.

        The guide is in training mode meanwhile. Its learning rate is the optimizer's: drive it by a scheduler.

        Args:
            passes: over the record, >= 1 (paper: 3).
            clear: forget the record afterwards.

        Raises:
            RuntimeError: nothing is recorded.
        """
        _checks.integer("passes", passes, at_least=1)
        steps, losses = self._steps(), []
        weight = next(self.disk.guide.parameters())
        with in_mode(self.disk.guide, training=True), without_autocast(weight):  # it would reach the backward pass too
            for _ in range(passes):
                order = torch.randperm(len(self), generator=self.generator).to(weight.device)
                losses.append(torch.stack([self._step(index) for index in order.tensor_split(steps)]).mean())
        self.optimizer.zero_grad()
        for buffer in self.disk.guide.buffers():
            if buffer.is_floating_point():  # BatchNorm's statistics, of which each process has seen its share
                buffer.copy_(self._mean(buffer))
        if clear:
            self.clear()
        means: list[float] = self._mean(torch.stack(losses)).tolist()
        return means

    def guide_loss(self, index: Tensor) -> Tensor:
        """Return the guide's loss over the recorded positions ``index`` (B,), int64, with the guide's gradient."""
        return loss_of(self.disk, self._record.rows(index))

    def clear(self) -> None:
        """Forget the record; its memory stays."""
        self._record.clear()

    @property
    def bytes_per_sample(self) -> int:
        """Bytes that a recorded position takes.

        Raises:
            RuntimeError: nothing was recorded yet, which tells the widths.
        """
        if not self._record.bytes_per_row:
            raise RuntimeError("bytes_per_sample is known from the first recorded batch on, got none yet")
        return self._record.bytes_per_row

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer, generator and the record, which is empty after ``train_guide``; the guide is the loss's."""
        generator = self.generator.get_state()
        return {"optimizer": self.optimizer.state_dict(), "generator": generator, **self._record.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, bit for bit.

        Raises:
            RuntimeError: entries missing or unknown, a record of another capacity.
        """
        if set(state) != set(self.state_dict()):
            raise RuntimeError(f"expected a state with {sorted(self.state_dict())}, got {sorted(state)}")
        self.optimizer.load_state_dict(state["optimizer"])
        self._record.load_state_dict(state, next(self.disk.guide.parameters()).device)
        self.generator.set_state(state["generator"].cpu())

    def _mean(self, value: Tensor) -> Tensor:
        return mean_over_processes(value, self.process_group)

    def _steps(self) -> int:
        """Steps in a pass: those of the mean record, as every process has to make the same number."""
        device = next(self.disk.guide.parameters()).device
        mean = self._mean(torch.tensor(float(len(self)), device=device)).item()
        if not mean:
            raise RuntimeError(
                "train_guide() needs recorded positions, got none: call student_loss() or record() first"
            )
        return math.ceil(mean / self.batch_size)

    def _step(self, index: Tensor) -> Tensor:
        """Make a step of the guide; return its loss."""
        loss = self.guide_loss(index)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(self.disk.guide.parameters(), self.process_group)
        self.optimizer.step()
        return loss.detach()


def _check_optimizer(optimizer: torch.optim.Optimizer, guide: nn.Module) -> None:
    """Refuse one that would train something else, or leave some of the guide untrained."""
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
