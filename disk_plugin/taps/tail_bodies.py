"""The modules of a teacher's tail: the last stage of a hierarchical model, the last blocks of an isotropic one.

Each is found by names of submodules and kept only if it reproduces the teacher's final map from the input that the
teacher itself gave to it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .timm_models import Layout, grid_of

_RELATIVE_TOLERANCE = 1e-3  # a wrong module differs by the size of the map, another order of operations by rounding
_POOLS = ("avgpool", "global_pool")

# the container of the stages and the norms that may follow its last one, in timm
_STAGES = (("layers", "norm"), ("stages", "norm_pre"), ("stages", "norm"), ("stages", None))


class Found(NamedTuple):
    """A tail's modules, and the maps of the probe."""

    body: nn.Module
    final_blocks: nn.Module | None
    entry: Tensor
    final: Tensor
    fixed_size: bool


class Stage(nn.Module):
    """Modules one after the other, from map to map.

    Args:
        parts: the last stage and what follows it.
        channels_last: whether they read (N, H, W, C).
        relu: whether the map is activated after them, as in mdistiller's ResNets for ImageNet.
    """

    def __init__(self, parts: Sequence[nn.Module], *, channels_last: bool, relu: bool) -> None:
        super().__init__()
        self.parts, self.channels_last, self.relu = nn.ModuleList(parts), channels_last, relu

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return the map (N, C', H', W') of a map (N, C, H, W)."""
        x: Any = feature_map.permute(0, 2, 3, 1).contiguous() if self.channels_last else feature_map
        for part in self.parts:
            x = part(x)
            x = x[0] if isinstance(x, tuple) else x  # mdistiller: (activated, before activation)
        x = x.relu() if self.relu else x
        result: Tensor = x.permute(0, 3, 1, 2) if self.channels_last else x
        return result


class Blocks(nn.Module):
    """Blocks of a transformer on patch tokens alone, from map to map.

    Blocks with rotary positions or position biases count the class and register tokens. For these, placeholders are put
    in their places, which no patch token attends to.

    Args:
        blocks: consecutive blocks.
        norm: the norm after them, or None.
        first: index of the first one in the teacher.
        teacher: the model, for its positions.
    """

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module | None, first: int, teacher: Any) -> None:
        super().__init__()
        self.blocks, self.norm, self.first = nn.ModuleList(blocks), norm, first
        self.rope, self.bias = getattr(teacher, "rope", None), getattr(teacher, "rel_pos_bias", None)
        self.by_depth = bool(getattr(teacher, "rope_mixed", False))
        tables = [getattr(getattr(each, "attn", None), "relative_position_bias_table", None) for each in blocks]
        self.biased = self.bias is not None or any(each is not None for each in tables)
        self.prefix = int(getattr(teacher, "num_prefix_tokens", 0))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return the map (N, C, H, W) of a map of the same shape."""
        size = (feature_map.shape[2], feature_map.shape[3])
        tokens = feature_map.flatten(2).transpose(1, 2)
        prefix = self.prefix if self.rope is not None or self.biased else 0
        if prefix:
            tokens = torch.cat([tokens.new_zeros(tokens.shape[0], prefix, tokens.shape[2]), tokens], 1)
        tokens = self.run(tokens, size, hidden=prefix)
        return tokens[:, prefix:].transpose(1, 2).reshape(feature_map.shape)

    def run(self, tokens: Tensor, size: tuple[int, int], *, hidden: int = 0) -> Tensor:
        """Return tokens (N, L, C) after the blocks; no token attends to the first ``hidden`` ones."""
        keys = torch.arange(tokens.shape[1], device=tokens.device) >= hidden
        options: dict[str, Any] = {}
        if self.biased:
            hiding = torch.zeros_like(keys, dtype=tokens.dtype).masked_fill(~keys, -math.inf).view(1, 1, 1, -1)
            options["shared_rel_pos_bias"] = hiding if self.bias is None else hiding + self.bias()
        elif hidden:
            options["attn_mask"] = keys.view(1, 1, 1, -1)
        rope = None if self.rope is None else self.rope.get_embed(shape=list(size))
        for index, block in enumerate(self.blocks, self.first):
            if rope is not None:
                options["rope"] = rope[index] if self.by_depth else rope
            tokens = block(tokens, **options)
        return tokens if self.norm is None else self.norm(tokens)


def find_stage(teacher: Any, images: Tensor) -> Found:
    """Return the tail of a teacher with stages.

    Raises:
        ValueError: it has no such stages, or none that reproduces its final map.
    """
    reasons = []
    for last, norms in _last_stages(teacher):
        entry, final = record(teacher, images, last)
        layout = Layout.of(teacher, final)
        for relu in (False, True):
            body = Stage([last, *norms], channels_last=layout.order == "NHWC", relu=relu).eval()
            entry_map, final_map = layout.to_map(entry), layout.to_map(final)
            with torch.no_grad():
                found = body(entry_map)
            if _same(found, final_map):
                fixed = any(_has_fixed_mask(module) for module in body.modules())
                return Found(body, None, entry_map, final_map, fixed)
        reasons.append(f"{type(last).__name__} and {len(norms)} norms do not reproduce the final map")
    raise ValueError("; ".join(reasons) or "it has no stages, layers, blocks, layer3 or layer4")


def find_blocks(teacher: Any, images: Tensor, blocks: int, final_blocks: int) -> Found:
    """Return the tail of a teacher of equal blocks.

    Raises:
        ValueError: it has too few blocks, or they do not reproduce its final tokens.
    """
    end = len(teacher.blocks) - final_blocks
    start = end - blocks
    if start < 0:
        raise ValueError(f"it has {end + final_blocks} blocks, got blocks={blocks} and final_blocks={final_blocks}")
    entry, final = record(teacher, images, teacher.blocks[start])
    layout = Layout.of(teacher, final)
    if layout.order != "NLC" or entry.ndim != 3:
        raise ValueError(f"its blocks must read tokens (N, L, C), got {tuple(entry.shape)}")
    size = grid_of(teacher, tuple(images.shape[2:]), final.shape[1] - layout.prefix)
    norm = getattr(teacher, "norm", None)
    body = Blocks(teacher.blocks[start:end], None if final_blocks else norm, start, teacher).eval()
    last = Blocks(teacher.blocks[end:], norm, end, teacher).eval() if final_blocks else None
    maps = [each[:, layout.prefix :].transpose(1, 2).reshape(each.shape[0], -1, *size) for each in (entry, final)]
    with torch.no_grad():
        found = body.run(entry, size)
        found = found if last is None else last.run(found, size)
        body(maps[0])  # patch tokens alone: blocks of a kind unknown here may fail without the others
    if not _same(found, final):
        raise ValueError(f"its last {blocks + final_blocks} blocks and its norm do not reproduce its final tokens")
    fixed = body.biased or (body.rope is not None and getattr(body.rope, "feat_shape", None) is not None)
    return Found(body, last, maps[0], maps[1], fixed or not _reads(body, maps[0].repeat(1, 1, 2, 2)))


@torch.no_grad()
def record(teacher: Any, images: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the input of a module and the final features of one forward pass.

    Raises:
        ValueError: the module is not called, or the model has neither ``forward_features`` nor a pooling module.
    """
    pool = next((each for name in _POOLS if isinstance(each := getattr(teacher, name, None), nn.Module)), None)
    seen: dict[nn.Module, Tensor] = {}

    def keep(watched: nn.Module, args: tuple[Any, ...]) -> None:
        seen[watched] = args[0].clone()  # what follows may write into it

    hooks = [each.register_forward_pre_hook(keep) for each in (module, pool) if each is not None]
    try:
        by_method = hasattr(teacher, "forward_features")
        output = teacher.forward_features(images) if by_method else teacher(images)
    finally:
        for hook in hooks:
            hook.remove()
    if module not in seen:
        raise ValueError(f"its last stage, a {type(module).__name__}, is not called")
    if by_method:
        return seen[module], output
    if pool is None or pool not in seen:
        raise ValueError(f"it has neither forward_features nor a pooling module called {' or '.join(_POOLS)}")
    return seen[module], seen[pool]


def _last_stages(teacher: Any) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield candidates: a last stage and the norms after it."""
    for name, norm in _STAGES:
        stages = getattr(teacher, name, None)
        after = getattr(teacher, norm, None) if norm else None
        if isinstance(stages, nn.Sequential | nn.ModuleList) and len(stages) and (norm is None or after is not None):
            yield stages[-1], [] if after is None else [after]
    last = getattr(teacher, "layer4", getattr(teacher, "layer3", None))
    if isinstance(last, nn.Module):
        yield last, []


def _has_fixed_mask(module: Any) -> bool:
    """Whether an attention mask, as of shifted windows, is stored for one size."""
    return isinstance(getattr(module, "attn_mask", None), Tensor) and not getattr(module, "dynamic_mask", False)


@torch.no_grad()
def _reads(body: nn.Module, feature_map: Tensor) -> bool:
    """Whether the blocks read a map of this size: some mix or bias a number of tokens that is fixed."""
    try:
        body(feature_map)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()  # a sum of squares overflows float16
    return bool((found - expected).norm() <= _RELATIVE_TOLERANCE * expected.norm())
