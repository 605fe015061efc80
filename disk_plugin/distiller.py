"""Student, teacher and loss as one module, for loops whose criterion sees only output and target."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .features.guided import Guided, GuidedTerms
from .features.method import Outputs
from .guide import GuideHead, reads_features
from .loss import DiSKLoss
from .schedule import DualScheduler
from .taps import FeatureTap, logits_of, with_features


class Distiller(nn.Module):
    """A student that learns from a teacher: ``distiller(x, target).loss.backward()``, ``distiller(x)`` at inference.

    **This module has parameters**: the student's, the guide's and, if there is one, the method's; give
    ``distiller.parameters()`` to the optimizer. The teacher is frozen and in evaluation mode, moves with the module,
    and is in neither its parameters nor its ``state_dict``.

    Args:
        student: any classifier; its output may be a Tensor, a tuple, a dict or an object, see ``taps.logits_of``.
        teacher: a classifier of the same classes.
        loss: a ``DiSKLoss``, or a ``Guided`` around it and a method that reads logits or features; None for
            ``DiSKLoss`` with a ``GuideHead`` that fits the teacher.
        epochs: number of training epochs, for ``dual``, the loss's ``DualScheduler``; None if you make your own.
        steps_per_epoch: number of training batches in an epoch: ``dual`` then steps by itself. None: call
            ``distiller.dual.step()`` after each epoch.
        **settings: arguments of the ``DiSKLoss`` that is made if ``loss`` is None, such as ``temperature``.

    Attributes:
        student: the model to deploy.
        dual: the ``DualScheduler``, saved in this module's ``state_dict``; None without ``epochs``.
        logits: the student's logits of the last batch with a target, detached, (N, C): for its accuracy.

    Shape:
        x as both models take it; target (N,), (N, d1, ...) or the logits' shape. Returns scalars
        (``disk_plugin.features.GuidedTerms``), or without a target the student's own output.

    Raises:
        ValueError: a method that reads feature maps, which cannot be found in an arbitrary model; a teacher without a
            Linear layer if its features are read; models that share trainable parameters; ``steps_per_epoch`` without
            ``epochs``; values below 1.
        TypeError: ``loss`` is of another type; settings beside a ``loss``.
        RuntimeError: in ``load_state_dict``, a state that was saved without ``epochs``.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> student, teacher = nn.Linear(4, 10), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> distiller = Distiller(student, teacher, epochs=5, steps_per_epoch=100, temperature=4)
        >>> distiller(torch.randn(3, 4), torch.tensor([1, 2, 3])).loss.backward()
        >>> distiller.eval()(torch.randn(3, 4)).shape
        torch.Size([3, 10])
    """

    teacher: nn.Module
    _read_student: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: DiSKLoss | Guided | None = None,
        *,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_apart(student, teacher)
        self.guided, teacher = fit_to_teacher(teacher, loss, settings)
        self.student = student.model if isinstance(student, FeatureTap) else student
        if reads_student_features(self.guided) and not isinstance(student, FeatureTap):
            student = with_features(student)
        # not submodules: the teacher is neither trained nor saved, and a tap would prefix the student's keys
        object.__setattr__(self, "teacher", teacher)
        object.__setattr__(self, "_read_student", student)
        if steps_per_epoch is not None:
            _checks.integer("steps_per_epoch", steps_per_epoch, at_least=1)
            if epochs is None:
                raise ValueError(f"steps_per_epoch={steps_per_epoch} needs epochs, got None")
        self.dual = None if epochs is None else DualScheduler(self.guided.disk, epochs=epochs)
        self.steps_per_epoch, self._steps = steps_per_epoch, 0  # steps of the current epoch
        self.logits: Tensor | None = None
        # after the buffers that it writes into, so that a schedule of other epochs is this module's
        self.register_load_state_dict_post_hook(_load_schedule)  # type: ignore[no-untyped-call]
        self._loaded: dict[str, Any] | None = None

    def forward(self, x: Any, target: Tensor | None = None) -> Any:
        """Return the terms of a training batch or, without a target, the student's output."""
        if target is None:
            return self.student(x)
        if self.steps_per_epoch is not None and self.training and torch.is_grad_enabled():
            self._count_step()
        with torch.no_grad():
            teacher = outputs_of(self.teacher, x)
        student = outputs_of(self._read_student, x)
        self.logits = student.logits.detach()
        terms: GuidedTerms = self.guided.terms(student, teacher, target)
        return terms

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count_step(self) -> None:
        """Step the schedule with the first batch of every later epoch: until then, statistics can be read."""
        if self.dual is not None and self._steps == self.steps_per_epoch:
            self.dual.step()
            self._steps = 0
        self._steps += 1

    def get_extra_state(self) -> dict[str, Any]:
        """Return the schedule's progress."""
        return {"dual": self.dual and self.dual.state_dict(), "steps": self._steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the schedule's progress; it is ignored if this module has no schedule."""
        if self.dual is None:
            return
        if state["dual"] is None:
            raise RuntimeError("the state holds no schedule, as it was saved by a Distiller without epochs")
        self._loaded = state

    def train(self, mode: bool = True) -> "Distiller":
        """Set the mode of student, guide and method; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Distiller":
        """Move the teacher too."""
        self.teacher._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _load_schedule(distiller: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(distiller, Distiller) and distiller.dual is not None and distiller._loaded is not None:
        distiller.dual.load_state_dict(distiller._loaded["dual"])
        distiller._steps, distiller._loaded = distiller._loaded["steps"], None


def fit_to_teacher(
    teacher: nn.Module, loss: DiSKLoss | Guided | None, settings: Mapping[str, Any]
) -> tuple[Guided, nn.Module]:
    """Return loss and teacher as a host of any two classifiers needs them.

    Args:
        teacher: a classifier.
        loss: as of ``Distiller``; None for a ``DiSKLoss`` with a ``GuideHead`` that fits the teacher.
        settings: of that ``DiSKLoss``.

    Returns:
        The loss; the teacher, frozen, in evaluation mode, returning its features too if guide or method read them.

    Raises:
        ValueError: a method that reads feature maps; a teacher without a Linear layer where its features are read.
        TypeError: ``loss`` is of another type; settings beside a ``loss``.
    """
    if loss is None:
        teacher = _tapped(teacher)
        loss = DiSKLoss(GuideHead(_num_classes(teacher), teacher.feature_dim), **settings)
    elif settings:
        raise TypeError(f"{sorted(settings)} are settings of a loss, which was given too: give them to that loss")
    if not isinstance(loss, DiSKLoss | Guided):
        raise TypeError(f"loss must be a DiSKLoss or a Guided, got {type(loss).__name__}")
    guided = loss if isinstance(loss, Guided) else Guided(loss)
    reads = frozenset[str]() if guided.method is None else guided.method.reads
    read = reads if guided.method is None else guided.method.reads_of("student") | guided.method.reads_of("teacher")
    if read - {"features", "head"}:
        raise ValueError(
            f"{type(guided.method).__name__} reads {sorted(read)}, of which only features can be found in any "
            f"classifier: call Guided in a loop of your own"
        )
    if reads or reads_features(guided.disk.guide):
        teacher = _tapped(teacher)
    return guided, teacher.eval().requires_grad_(False)


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError if a parameter that the student trains is the teacher's too, which is frozen."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    own = ((name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad)
    shared = [name for name, parameter in own if id(parameter) in theirs]
    if shared:
        raise ValueError(
            f"the teacher, which is frozen, must share no trainable parameter with the student, got {len(shared)}, "
            f"among them {shared[0]}: pass copy.deepcopy(model) as teacher"
        )


def reads_student_features(guided: Guided) -> bool:
    """Return whether the method reads features of the student, beside its logits."""
    return guided.method is not None and "features" in guided.method.reads_of("student")


def outputs_of(model: nn.Module, *args: Any, **kwargs: Any) -> Outputs:
    """Run a model once; a ``FeatureTap`` also returns its features."""
    if isinstance(model, FeatureTap):
        logits, features = model(*args, **kwargs)
        return Outputs(logits, features, head=model.head)
    return Outputs(logits_of(model(*args, **kwargs)))


def _tapped(teacher: nn.Module) -> FeatureTap:
    """Return a teacher that returns its features beside its logits."""
    return teacher if isinstance(teacher, FeatureTap) else with_features(teacher.eval())


def _num_classes(teacher: FeatureTap) -> int:
    """Return the output width of the tapped layer, a Linear or a convolution."""
    layer: Any = teacher.model.get_submodule(teacher.layer)
    return int(getattr(layer, "out_features", None) or layer.out_channels)
