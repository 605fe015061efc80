"""The base class of distillation methods: losses per sample from the outputs of two models. One method, one file."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..taps.tails import TeacherTail

_RELATIVE_TOLERANCE = 1e-2  # a wrong layer differs by the size of the logits, half precision by less
LAST_MAP = "last"  # name of the feature map before the global pooling
BEFORE_LAST_MAP = "before_last"  # name of the map before the last stage; of equal blocks, after three quarters of them


class Outputs(NamedTuple):
    """A model's outputs for a batch, as far as a method reads them.

    Attributes:
        logits: (N, C) or (N, C, d1, ...); may be None for a student whose own head is unused (``own_prediction``).
        features: (N, D), the input of the last Linear.
        maps: feature maps (N, D, H, W) by name; ``"last"`` is the one before the pooling, ``"before_last"`` the one
            that the last stage reads.
        head: the model's own last layer, from features to logits, for a method that changes what it reads.
    """

    logits: Tensor
    features: Tensor | None = None
    maps: Mapping[str, Tensor] = {}
    head: Callable[[Tensor], Tensor] | None = None


def _no_tail(**options: Any) -> TeacherTail:
    raise ValueError("this host does not show the teacher's last stage: give the method a TeacherTail of your own")


class Pair(NamedTuple):
    """A student and a teacher for which a method is built.

    Attributes:
        student: the student's outputs for a probe batch.
        teacher: the teacher's.
        teacher_head: returns a module from the teacher's last map to its logits, checked to reproduce them; raises
            ValueError with the reason if there is none.
        teacher_tail: returns the teacher's last stage, for keywords of ``get_tail`` such as ``blocks``; raises
            ValueError with the reason if there is none.
    """

    student: Outputs
    teacher: Outputs
    teacher_head: Callable[[], nn.Module]
    teacher_tail: Callable[..., TeacherTail] = _no_tail


class Method(nn.Module):
    """A distillation loss per sample, used alone or weighted by DiSK's guide.

    A subclass defines ``forward`` and, if needed, the class attributes below. Its own parameters are trained with the
    student's. It reads ``Outputs`` and is independent of any host. A host builds it by ``for_pair``, turns its settings
    (the keyword-only arguments of ``__init__`` whose default is a number, a string, a bool or a tuple of floats) into
    flags or configuration keys, and calls ``evaluate``. docs/write_a_method.md walks through one.

    Attributes:
        reads: what it reads of both models beside their logits: ``"features"``, ``"head"``, and names of
            ``Outputs.maps``.
        student_reads: what it reads of the student alone, beside ``reads``.
        unguided: names of losses that the guide does not weight, such as the cross-entropy.
        scaffolded: names of losses on the logits that DiSK's own take the place of where the method is guided.
        prepared: whether nothing is left to do before training, see ``prepare``.
        own_prediction: whether inference needs the method (``predict``) instead of the student's own logits.
        weight_name: name of the weight of its losses in hosts.
        shape_settings: names of settings on which the shapes of its parameters depend.

    Examples:
        >>> from torch.nn import functional as F
        >>> class Similarity(Method):
        ...     def forward(self, student, teacher, target):
        ...         return {"cosine": 1 - F.cosine_similarity(student.logits, teacher.logits.detach())}
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    student_reads: ClassVar[frozenset[str]] = frozenset()
    unguided: frozenset[str] = frozenset()
    scaffolded: ClassVar[frozenset[str]] = frozenset()
    prepared: bool = True
    own_prediction: ClassVar[bool] = False
    weight_name: ClassVar[str] = "loss_weight"
    shape_settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def for_pair(cls, pair: Pair, **settings: Any) -> "Method":
        """Build the method for a pair of models.

        Raises:
            ValueError: it cannot be used with this pair.
        """
        return cls(**settings)

    @classmethod
    def reads_of(cls, model: Literal["student", "teacher"]) -> frozenset[str]:
        """Return what it reads of one of the two models, beside the logits."""
        return cls.reads | cls.student_reads if model == "student" else cls.reads

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Return losses per sample by name, (N,), or (N, d1, ...) for dense logits."""
        raise NotImplementedError(f"{type(self).__name__} needs forward(student, teacher, target) -> losses by name")

    def predict(self, student: Outputs) -> Tensor:
        """Return the logits of inference, without a teacher."""
        if student.logits is None:
            raise ValueError(f"{type(self).__name__} predicts by the student's logits, got None")
        return student.logits

    def evaluate(self, student: Outputs, teacher: Outputs, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return prediction and losses of a training batch; override it if both share an expensive part."""
        return self.predict(student), self(student, teacher, target)

    def about(self) -> dict[str, Any]:
        """Return what ``from_state`` needs beside the ``state_dict``: numbers and lists of them."""
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> "Method":
        """Rebuild the method for inference, without the teacher, from its ``state_dict`` and the result of ``about``.

        Raises:
            NotImplementedError: not overridden; a method with a prediction of its own has to.
        """
        raise NotImplementedError(f"{cls.__name__} has a prediction of its own and needs from_state(state, about)")

    def prepare(
        self,
        batches: Iterable[tuple[Outputs, Tensor]],
        *,
        folder: Path | None = None,
        shared: bool = False,
        progress: bool = True,
    ) -> str:
        """Do what precedes the student's training, once, on the teacher's outputs; return a report to show.

        A host calls it before the first epoch unless ``prepared``, and carries what it leaves in the ``state_dict``.

        Args:
            batches: the teacher's outputs and the targets (N,) of the training data.
            folder: the run's, for a file of the result; None for none.
            shared: whether every process calls it, each with its own part of the data.
            progress: whether to show a bar.
        """
        return ""

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, for weights that warm up; hosts call it."""

    def frozen_modules(self) -> list[nn.Module]:
        """Return its submodules that are never trained, such as parts of the teacher."""
        return []

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters to train beside the student's."""
        frozen = {parameter for module in self.frozen_modules() for parameter in module.parameters()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and parameter not in frozen]

    def requires_grad_(self, requires_grad: bool = True) -> "Method":
        """Change what is trained, and nothing of the ``frozen_modules``."""
        super().requires_grad_(requires_grad)
        for module in self.frozen_modules():
            module.requires_grad_(False)
        return self


class PlainLoss(Method):
    """Any callable (student_logits, teacher_logits, target) -> losses (N,) as a method; a module's parameters train."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Call the loss on the logits."""
        return {"loss": self.loss(student.logits, teacher.logits, target)}


@torch.no_grad()
def check_head(outputs: Outputs) -> None:
    """Raise ValueError unless ``outputs.head`` makes the logits from the features."""
    if outputs.features is None or outputs.head is None:
        raise ValueError("the model shows no single last layer with its input, which the method needs")
    found, logits = outputs.head(outputs.features), outputs.logits
    if found.shape != logits.shape or not (found - logits).norm() <= _RELATIVE_TOLERANCE * logits.norm():
        raise ValueError("the model's last Linear layer does not make its logits from the features")


def to_outputs(given: Tensor | Outputs) -> Outputs:
    """Wrap logits into ``Outputs``."""
    return given if isinstance(given, Outputs) else Outputs(given)
