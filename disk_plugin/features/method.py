"""What a distillation method is: losses per sample from what two models show of a batch. One method, one file."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

LAST_MAP = "last"  # name of the feature map before the global pooling


class Outputs(NamedTuple):
    """What a model shows of a batch; a host fills in what the method reads.

    Of a student whose own head takes no part (``Method.own_prediction``) the logits may be None.
    """

    logits: Tensor  # (N, C) or (N, C, d1, ...)
    features: Tensor | None = None  # (N, D), what its last Linear reads
    maps: Mapping[str, Tensor] = {}  # feature maps by name, (N, D, H, W); "last" is the one before the pooling


class Pair(NamedTuple):
    """What a method is built for: outputs of both models for a probe batch, and the teacher's way from map to logits.

    ``teacher_head()`` returns a module from the teacher's last map to its logits, checked to reproduce them; it raises
    ValueError, saying why, where there is none.
    """

    student: Outputs
    teacher: Outputs
    teacher_head: Callable[[], nn.Module]


class Method(nn.Module):
    """A distillation loss per sample, which a host trains a student with, alone or weighted by DiSK's guide.

    A subclass writes ``forward`` and, where it needs them, the class attributes below; its own parameters are trained
    beside the student's. It reads ``Outputs`` and knows no host: each of them builds it by ``for_pair``, makes
    its settings (the keyword-only arguments of ``__init__`` whose default is a number, a word or a bool) into flags or
    keys of its configuration, and calls ``evaluate``. docs/write_a_method.md walks through one.

    Attributes:
        reads: what it reads of both models beside their logits: ``"features"``, and names of ``Outputs.maps``.
        unguided: names of losses that the guide does not weigh, as they are no sample's difficulty.
        own_prediction: whether inference needs the method (``predict``), and not the student's own logits.
        weight_name: what hosts call the weight of its losses.
        shape_settings: names of settings on which the shapes of its parameters depend.

    Examples:
        >>> from torch.nn import functional as F
        >>> class Similarity(Method):
        ...     def forward(self, student, teacher, target):
        ...         return {"cosine": 1 - F.cosine_similarity(student.logits, teacher.logits.detach())}
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    unguided: ClassVar[frozenset[str]] = frozenset()
    own_prediction: ClassVar[bool] = False
    weight_name: ClassVar[str] = "loss_weight"
    shape_settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def for_pair(cls, pair: Pair, **settings: Any) -> "Method":
        """Build it for a pair of models.

        Raises:
            ValueError: it cannot be used with this pair.
        """
        return cls(**settings)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Return losses per sample by name, (N,) or, of dense logits, (N, d1, ...)."""
        raise NotImplementedError(f"{type(self).__name__} needs forward(student, teacher, target) -> losses by name")

    def predict(self, student: Outputs) -> Tensor:
        """Return the logits of inference, where there is no teacher."""
        if student.logits is None:
            raise ValueError(f"{type(self).__name__} predicts by the student's logits, got None")
        return student.logits

    def evaluate(self, student: Outputs, teacher: Outputs, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return prediction and losses of a training batch; overridden where both share an expensive part."""
        return self.predict(student), self(student, teacher, target)

    def about(self) -> dict[str, Any]:
        """Return what ``from_state`` needs beside the parameters: numbers and lists of them."""
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> "Method":
        """Rebuild it for inference, without the teacher, from its ``state_dict`` and what ``about`` said.

        Raises:
            NotImplementedError: a method with a prediction of its own has to say how.
        """
        raise NotImplementedError(f"{cls.__name__} has a prediction of its own and needs from_state(state, about)")

    def begin_epoch(self, epoch: int) -> None:
        """Learn which epoch begins, counted from 0: for weights that warm up. A host calls it."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer trains beside the student."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class PlainLoss(Method):
    """Any callable (student_logits, teacher_logits, target) -> losses (N,) as a method; a module's parameters train."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Call it."""
        return {"loss": self.loss(student.logits, teacher.logits, target)}


def to_outputs(given: Tensor | Outputs) -> Outputs:
    """Take logits alone for outputs."""
    return given if isinstance(given, Outputs) else Outputs(given)
