"""The rate-distortion modules of CIFD, several as one batch of modules: section 3.1 and appendix A.2 of the paper."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _checks
from .density import FactorizedDensity


class ModuleOutputs(NamedTuple):
    """What M rate-distortion modules make of a batch of embeddings.

    Attributes:
        code: of the channel, with noise in training mode, else rounded, (M, N, B).
        reconstruction: of the embeddings, (M, N, D).
        logits: (M, N, C); None without classes.
    """

    code: Tensor
    reconstruction: Tensor
    logits: Tensor | None


class RateDistortionModule(nn.Module):
    """Squeezes a teacher's embeddings through a noisy channel, and reconstructs them and the class logits.

    It imitates a smaller teacher: CIFD, NeurIPS 2024, section 3.1. One object holds M modules, which differ in the
    weight of the distortion and compute as one batch. In training mode the channel adds uniform noise of width 1, in
    evaluation mode it rounds (appendix A.1.1). ``fit_rdms`` makes and trains one.

    Args:
        dim: D, width of the teacher's embeddings, what its last Linear reads.
        num_classes: C; 0 for no classifier, as with embeddings of images and text.
        distortion_weights: of each module, the paper's R, > 0: the weight of the distortion against the rate. The
            lower, the less information passes.
        hidden_dim: width of the hidden layers and of the channel; None for D up to 1024 (the paper's ResNet-34), else
            D / 2 (its ResNet-50).
        nonnegative: whether embeddings are >= 0, as after a ReLU and average pooling: a ReLU ends the decoder.

    Attributes:
        report: what ``fit_rdms`` measured, by name, one value per module; None before.

    Shape:
        embeddings (N, D); returns ``ModuleOutputs``.

    Raises:
        ValueError: sizes that are not positive, no or non-positive weights; in ``forward``, another width.

    Examples:
        >>> modules = RateDistortionModule(16, 10, distortion_weights=(1e4, 1e3)).eval()
        >>> modules(torch.rand(4, 16)).reconstruction.shape
        torch.Size([2, 4, 16])
    """

    def __init__(
        self,
        dim: int,
        num_classes: int = 0,
        *,
        distortion_weights: Sequence[float] = (1.0,),
        hidden_dim: int | None = None,
        nonnegative: bool = True,
    ) -> None:
        super().__init__()
        _checks.integer("dim", dim, at_least=1)
        _checks.integer("num_classes", num_classes, at_least=0)
        if hidden_dim is not None:
            _checks.integer("hidden_dim", hidden_dim, at_least=1)
        self.distortion_weights = check_weights(distortion_weights)
        self.dim, self.num_classes, self.nonnegative = int(dim), int(num_classes), bool(nonnegative)
        self.hidden_dim = int(hidden_dim or (dim if dim <= 1024 else dim // 2))
        count, hidden = len(self.distortion_weights), self.hidden_dim
        self.encoder = nn.Sequential(StackedLinear(count, dim, hidden), nn.ReLU(), StackedLinear(count, hidden, hidden))
        self.density = FactorizedDensity(count * hidden)
        # the paper's ResNet-34 modules: the decoder's hidden layer is the reconstruction itself (the paper's cost)
        decoder: list[nn.Module] = [StackedLinear(count, hidden, hidden)]
        if hidden != dim:
            decoder += [nn.ReLU(), StackedLinear(count, hidden, dim)]
        self.decoder = nn.Sequential(*decoder, *([nn.ReLU()] if nonnegative else []))
        self.classifier = StackedLinear(count, dim, num_classes) if num_classes else None
        self.report: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.distortion_weights)

    def forward(self, embeddings: Tensor) -> ModuleOutputs:
        """Encode, pass the channel, decode, classify."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings must have shape (N, {self.dim}), got {tuple(embeddings.shape)}")
        code: Tensor = self.encoder(embeddings.expand(len(self), *embeddings.shape))
        code = code + torch.rand_like(code) - 0.5 if self.training else code.round()
        reconstruction: Tensor = self.decoder(code)
        return ModuleOutputs(code, reconstruction, None if self.classifier is None else self.classifier(reconstruction))

    def rate(self, code: Tensor) -> Tensor:
        """Return the rate of each sample's code, summed over channels, nats: (M, N, B) -> (M, N)."""
        flat = code.transpose(0, 1).flatten(1)
        rates = self.density.rate(flat).reshape(len(flat), len(self), self.hidden_dim)
        return rates.sum(2).t()

    @property
    def fitted(self) -> bool:
        """Whether ``fit_rdms`` has trained it, or it was loaded from such a one."""
        return self.report is not None

    def table(self) -> str:
        """Return what ``fit_rdms`` measured as a table in Markdown."""
        if self.report is None:
            return "not fitted"
        report, accuracy = self.report, self.report["accuracy"]
        lines = ["| R | rate, nats | distortion | accuracy, % |", "|---|---|---|---|"]
        for i, weight in enumerate(self.distortion_weights):
            shown = "" if accuracy is None else f"{accuracy[i]:.1f}"
            lines.append(f"| {weight:g} | {report['rate'][i]:.1f} | {report['distortion'][i]:.4g} | {shown} |")
        if accuracy is not None:
            lines.append(f"| teacher |  |  | {report['teacher_accuracy']:.1f} |")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the modules to a file."""
        partial = Path(path).with_suffix(f".{os.getpid()}.partial")
        torch.save({"settings": self.settings, "state": self.state_dict()}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RateDistortionModule":
        """Read the modules from a file that ``save`` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds something else.
        """
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"rate-distortion modules must be in {path}, found no such file") from error
        except Exception as error:  # unpickling raises whatever a stranger's bytes mean
            raise ValueError(f"{path} must be written by RateDistortionModule.save, got {error!r}") from error
        if not isinstance(found, dict) or found.keys() != {"settings", "state"}:
            raise ValueError(f"{path} must be written by RateDistortionModule.save, it holds something else")
        modules = cls(**found["settings"])
        modules.load_state_dict(found["state"])
        return modules.eval()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments to build it again."""
        names = ("dim", "num_classes", "hidden_dim", "nonnegative")
        return {name: getattr(self, name) for name in names} | {"distortion_weights": list(self.distortion_weights)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return what ``fit_rdms`` measured, which says that it has trained them, and the settings."""
        return {"report": self.report, "settings": self.settings}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load it; RuntimeError for modules that were built with other settings."""
        if state["settings"] != self.settings:
            raise RuntimeError(f"the state is of modules with {state['settings']}, these have {self.settings}")
        self.report = state["report"]

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"distortion_weights={self.distortion_weights}, fitted={self.fitted}"


class StackedLinear(nn.Module):
    """M linear layers, each for its own input: (M, N, D) -> (M, N, E); initialised as ``nn.Linear``."""

    def __init__(self, count: int, width_in: int, width_out: int) -> None:
        super().__init__()
        bound = width_in**-0.5
        self.weight = nn.Parameter(torch.empty(count, width_in, width_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, width_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Apply each layer to its input."""
        return torch.baddbmm(self.bias.to(x.dtype), x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return ", ".join(map(str, self.weight.shape))


def check_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights of the distortion as numbers, one per module.

    Raises:
        ValueError: none, or some that are not positive.
        TypeError: not a sequence of numbers.
    """
    if isinstance(weights, str | Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"distortion_weights (R) must be a sequence of numbers, got {type(weights).__name__}")
    if not weights:
        raise ValueError("distortion_weights (R) must hold a number per module, got none")
    for weight in weights:
        _checks.number("distortion_weights (R)", weight, above=0)
    return tuple(float(weight) for weight in weights)
