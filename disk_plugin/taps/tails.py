"""The frozen rest of a teacher, from its last stage to its final feature map, with gradient to its input.

It is the "teacher parameter perception" of ScaleKD (Fan et al., NeurIPS 2024). timm is not imported: a teacher's family
is told by its modules, and a tail is used only if it reproduces the teacher's own final map.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from .. import _checks
from .tail_bodies import Found, find_blocks, find_stage

WORKING = (
    "timm's Swin, SwinV2, ConvNeXt, ResNet, ViT, DeiT, BEiT and EVA, and ResNets with layer1 to layer3 or layer4 and "
    "an avgpool, such as mdistiller's and torchvision's"
)
_UNFROZEN = (
    "the teacher of this tail is not frozen, a parameter requires grad: call teacher.requires_grad_(False), after any "
    "requires_grad_(True) of a module that holds it"
)
_TRAINING = (
    "the teacher of this tail is in training mode, in which stochastic depth and BatchNorm make another target of "
    "every pass: call teacher.eval(), after any train() of a module that holds it"
)


class TeacherTail(nn.Module):
    """The rest of a teacher from the entry of its last stage to its final map, before its head; see ``get_tail``.

    The gradient reaches the input, not the teacher: its parameters are frozen by ``requires_grad_(False)``. The modules
    are the teacher's own, not copies, so they move with either. ``train()`` of this module leaves them alone, and they
    are not in its ``state_dict``.

    Args:
        body: a module in evaluation mode from a map (N, *entry_shape) to a map (N, *final_shape).
        entry_shape: (C, H, W) of a map that the last stage reads.
        final_shape: (C, H, W) of the teacher's final map for the same images.
        final_blocks: a module from a final map to a final map, for ``finish``; None for none.
        fixed_size: whether only maps of ``entry_shape`` can be read.
        checkpoint: whether to recompute the activations in the backward pass instead of storing them.

    Attributes:
        entry_width: number of channels at the entry.
        entry_size: (H, W) at the entry.
        final_width: number of channels of the final map.
        final_size: (H, W) of the final map.

    Shape:
        a map (N, entry_width, H, W), or tokens (N, H W, entry_width), row by row, with ``size=(H, W)``. Returns a map
        (N, final_width, H', W').

    Raises:
        RuntimeError: the teacher is in training mode; in ``forward``, the teacher is not frozen any more, or it is
            called under ``torch.no_grad()`` on an input that requires grad.
        ValueError: in ``forward``, an input of another shape, or a result of another one than ``final_shape``.

    Examples:
        >>> import torch
        >>> tail = TeacherTail(torch.nn.Conv2d(4, 8, 2, stride=2).eval(), (4, 6, 6), (8, 3, 3))
        >>> entry = torch.randn(2, 4, 6, 6, requires_grad=True)
        >>> tail(entry).square().sum().backward()
        >>> entry.grad.shape, tail.body.weight.grad
        (torch.Size([2, 4, 6, 6]), None)
    """

    def __init__(
        self,
        body: nn.Module,
        entry_shape: tuple[int, int, int],
        final_shape: tuple[int, int, int],
        *,
        final_blocks: nn.Module | None = None,
        fixed_size: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.body, self.final_blocks = body, final_blocks
        self.entry_width, *entry_size = entry_shape
        self.final_width, *final_size = final_shape
        self.entry_size, self.final_size = (entry_size[0], entry_size[1]), (final_size[0], final_size[1])
        self.fixed_size, self.checkpoint = bool(fixed_size), bool(checkpoint)
        self.training = False
        self._check_mode()
        self.requires_grad_(False)
        self._prefix = ""  # of its keys in the state that is being loaded
        self.register_load_state_dict_post_hook(_forget_missing)  # type: ignore[no-untyped-call]

    def forward(self, tokens_or_map: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the final map for an input of the last stage."""
        entry = self._to_map(tokens_or_map, size)
        if self.fixed_size and tuple(entry.shape[2:]) != self.entry_size:
            raise ValueError(
                f"the last stage of this teacher reads maps of size {self.entry_size}, got {tuple(entry.shape[2:])}: "
                f"it is made for one image size (timm: model.set_input_size(...), or dynamic_img_size=True)"
            )
        final = self._run(self.body, entry)
        declared = tuple(entry.shape[2:]) != self.entry_size or tuple(final.shape[2:]) == self.final_size
        if final.ndim != 4 or final.shape[1] != self.final_width or not declared:
            expected = (self.final_width, *self.final_size)
            raise ValueError(f"the tail's body must return its final_shape {expected}, got {tuple(final.shape[1:])}")
        return final

    def finish(self, final_map: Tensor) -> Tensor:
        """Apply the ``final_blocks``, through which the projection of the student's last stage passes too."""
        return final_map if self.final_blocks is None else self._run(self.final_blocks, final_map)

    def entry_size_for(self, final_size: tuple[int, int]) -> tuple[int, int]:
        """Return a size at the entry for which the final map has ``final_size``."""
        if tuple(final_size) == self.final_size:
            return self.entry_size
        # strides; rounded up, as an odd size is padded on its way down
        height, width = (-(-entry // final) for entry, final in zip(self.entry_size, self.final_size, strict=True))
        return final_size[0] * height, final_size[1] * width

    def requires_grad_(self, requires_grad: bool = True) -> "TeacherTail":
        """Freeze the teacher, whatever is asked for."""
        super().requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> "TeacherTail":
        """Change nothing: the modules are the teacher's, which stays in evaluation mode."""
        return self

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Return nothing: the teacher is saved by whoever owns it."""
        return OrderedDict() if destination is None else destination

    def extra_repr(self) -> str:
        """Show both shapes."""
        entry, final = (self.entry_width, *self.entry_size), (self.final_width, *self.final_size)
        return f"entry={entry}, final={final}, fixed_size={self.fixed_size}, checkpoint={self.checkpoint}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _run(self, body: nn.Module, feature_map: Tensor) -> Tensor:
        self._check_mode()
        if feature_map.requires_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "a tail was called under torch.no_grad() on an input that requires grad: no gradient would reach the "
                "student through it. The teacher's parameters are frozen, so call it with gradients enabled"
            )
        parameters = list(body.parameters())
        if any(parameter.requires_grad for parameter in parameters):
            raise RuntimeError(_UNFROZEN)
        given = feature_map
        if parameters and not torch.is_autocast_enabled(given.device.type):
            given = given.to(parameters[0].dtype)  # a teacher may be kept in half precision
        final: Tensor
        if self.checkpoint and given.requires_grad:  # nothing is drawn at random in evaluation mode
            final = checkpointed(body, given, use_reentrant=False, preserve_rng_state=False)
        else:
            final = body(given)
        return final if given is feature_map else final.to(feature_map.dtype)

    def _check_mode(self) -> None:
        if any(module.training for module in self.modules()):
            raise RuntimeError(_TRAINING)

    def _to_map(self, given: Tensor, size: tuple[int, int] | None) -> Tensor:
        if given.ndim == 3 and size is not None and tuple(given.shape[1:]) == (size[0] * size[1], self.entry_width):
            return given.transpose(1, 2).reshape(given.shape[0], self.entry_width, *size)
        if given.ndim == 4 and given.shape[1] == self.entry_width and size in (None, tuple(given.shape[2:])):
            return given
        raise ValueError(
            f"expected a map (N, {self.entry_width}, H, W), or tokens (N, H W, {self.entry_width}) with size=(H, W), "
            f"got {tuple(given.shape)} with size={size}"
        )


def get_tail(
    teacher: nn.Module,
    images: Tensor,
    *,
    blocks: int = 2,
    final_blocks: int = 0,
    checkpoint: bool = False,
) -> TeacherTail:
    """Return the tail of a teacher, checked to reproduce the teacher's own final map.

    The tail of a teacher with stages (Swin, ConvNeXt, ResNet) begins at the last one's downsampling and ends with the
    norm that follows. That of an isotropic one (ViT, DeiT, BEiT, EVA) is its last blocks and the norm after them. They
    read patch tokens alone, without class and register tokens, as in the authors' code.

    Args:
        teacher: in evaluation mode; its last stage is frozen by ``requires_grad_(False)``.
        images: (N, C, H, W), a batch that is not constant, of the size that it will be trained with.
        blocks: number of blocks in an isotropic teacher's tail; the authors' EVA-L has 2 of 24.
        final_blocks: number of blocks after those, left to ``TeacherTail.finish``: 0 as for the authors' EVA, 1 (with
            ``blocks=3``) as for their ViT.
        checkpoint: whether to recompute the tail's activations in the backward pass instead of storing them.

    Raises:
        ValueError: the teacher has no tail that works, and the message lists those that do; values out of range.
        TypeError: ``teacher`` is not a module, or a number of blocks not an int.
        RuntimeError: the teacher is in training mode.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> teacher = nn.Sequential()
        >>> teacher.layer3, teacher.layer4 = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 8, 2, stride=2)
        >>> teacher.avgpool, teacher.flat, teacher.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        >>> get_tail(teacher.eval(), torch.randn(2, 3, 12, 12))(torch.randn(2, 4, 6, 6)).shape
        torch.Size([2, 8, 3, 3])
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a Module, got {type(teacher).__name__}")
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must have shape (N, C, H, W), got {found}")
    _checks.integer("blocks", blocks, at_least=1)
    _checks.integer("final_blocks", final_blocks, at_least=0)
    if any(module.training for module in teacher.modules()):
        raise RuntimeError(_TRAINING)
    parts = _find(teacher, images, blocks, final_blocks)
    how: dict[str, Any] = {"final_blocks": parts.final_blocks, "fixed_size": parts.fixed_size, "checkpoint": checkpoint}
    return TeacherTail(parts.body, _shape(parts.entry), _shape(parts.final), **how)


def _find(teacher: nn.Module, images: Tensor, blocks: int, final_blocks: int) -> Found:
    """Find the tail among the known families, or raise ValueError with the reasons."""
    isotropic = isinstance(getattr(teacher, "blocks", None), nn.Sequential | nn.ModuleList)
    if final_blocks and not isotropic:
        raise ValueError(f"final_blocks must be 0 for a teacher without blocks such as a ViT's, got {final_blocks}")
    try:
        return find_blocks(teacher, images, blocks, final_blocks) if isotropic else find_stage(teacher, images)
    except Exception as error:  # a stranger's model may raise anything
        raise ValueError(
            f"no tail found in {type(teacher).__name__}: {error}. A tail works for {WORKING}. For another teacher give "
            f"TeacherTail(body, entry_shape, final_shape)"
        ) from error


def _shape(feature_map: Tensor) -> tuple[int, int, int]:
    return feature_map.shape[1], feature_map.shape[2], feature_map.shape[3]


def _forget_missing(tail: nn.Module, incompatible_keys: Any) -> None:
    """The teacher's keys are in no state, so none of them is missing."""
    prefix = str(tail._prefix)
    incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if not key.startswith(prefix)]
