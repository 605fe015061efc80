"""ScaleKD's cross-attention projector: a student's map in the width and at the locations of the teacher."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ... import _checks

NORMS: tuple[str, ...] = ("batch", "layer")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (N, C, H, W), at every location."""

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return the normalised map."""
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CrossAttentionProjector(nn.Module):
    r"""ScaleKD's cross-attention projector (Fan et al., NeurIPS 2024), as in the authors' code.

    Keys and values are the student's map after a convolution, a norm and a ReLU, plus a learned map of positions.
    Queries, one for each of the teacher's locations, are a learned table or given. There is no way around the
    attention:

    $$X = \mathrm{LN}\big(\mathrm{softmax}(s\,QK^\top / \sqrt{d})\,V W\big), \qquad X + \mathrm{FFN}(X)$$

    Positions and table are interpolated for maps of another size.

    Args:
        student_width: channels of the student's map.
        teacher_width: channels of the teacher's map, a multiple of ``heads``.
        student_size: (H, W) of the student's map, for the positions.
        query_size: (H, W) of the learned table of queries; None for no table: queries are then given.
        heads: number of attention heads.
        attention_scale: s > 0, the sharpness of the attention, beside its usual 1/sqrt(d); the authors' Swin teachers
            have 5, EVA 1 or 0.2.
        norm: of the student's map: ``"batch"``, or ``"layer"``, with which samples do not influence each other.

    Shape:
        student_map (N, student_width, H, W), queries (N, L, teacher_width). Returns (N, L, teacher_width), row by row.

    Raises:
        ValueError: ``heads`` that do not divide ``teacher_width``, values out of range; in ``forward``, neither queries
            nor a table, or shapes that do not fit.
        TypeError: values of another type.

    Examples:
        >>> import torch
        >>> projector = CrossAttentionProjector(16, 24, (14, 14), (7, 7))
        >>> projector(torch.randn(2, 16, 14, 14)).shape
        torch.Size([2, 49, 24])
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        student_size: tuple[int, int],
        query_size: tuple[int, int] | None = None,
        *,
        heads: int = 8,
        attention_scale: float = 5.0,
        norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        super().__init__()
        for name, value in {"student_width": student_width, "teacher_width": teacher_width}.items():
            _checks.integer(name, value, at_least=1)
        check_heads("heads", heads, teacher_width)
        _checks.number("attention_scale", attention_scale, above=0)
        _checks.choice("norm", norm, NORMS)
        self.student_width, self.teacher_width, self.heads = student_width, teacher_width, heads
        self.attention_scale, self.query_size = float(attention_scale), query_size and _pair("query_size", query_size)
        self.positions = nn.Parameter(torch.empty(1, student_width, *_pair("student_size", student_size)))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.table: nn.Parameter | None = None
        if self.query_size is not None:
            self.table = nn.Parameter(torch.randn(1, teacher_width, *self.query_size))
        self.stem = nn.Sequential(
            nn.Conv2d(student_width, student_width, 3, padding=1),
            nn.BatchNorm2d(student_width) if norm == "batch" else ChannelNorm(student_width, eps=1e-6),
            nn.ReLU(),
        )
        # on tokens a Linear is the authors' 1 x 1 convolution
        self.query = nn.Sequential(
            nn.Linear(teacher_width, teacher_width), nn.ReLU(), nn.Linear(teacher_width, teacher_width)
        )
        self.key, self.value = nn.Linear(student_width, teacher_width), nn.Linear(student_width, teacher_width)
        self.out = nn.Linear(teacher_width, teacher_width)
        self.norm = nn.LayerNorm(teacher_width)
        self.ffn = nn.Sequential(
            nn.Linear(teacher_width, 4 * teacher_width), nn.ReLU(), nn.Linear(4 * teacher_width, teacher_width)
        )

    def forward(
        self, student_map: Tensor, queries: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Return tokens, one per query; given queries are used instead of the table, which is read at ``size``."""
        if student_map.ndim != 4 or student_map.shape[1] != self.student_width:
            raise ValueError(
                f"student_map must have shape (N, {self.student_width}, H, W), got {tuple(student_map.shape)}"
            )
        queries = self._queries(student_map, queries, size)
        keys = self.stem(student_map)
        keys = (keys + _at_size(self.positions, keys.shape[2:])).flatten(2).transpose(1, 2)
        q = self._by_head(self.query(queries)).expand(student_map.shape[0], -1, -1, -1)
        k, v = self._by_head(self.key(keys)), self._by_head(self.value(keys))
        scale = self.attention_scale / (self.teacher_width // self.heads) ** 0.5
        read = F.scaled_dot_product_attention(q, k, v, scale=scale)
        normalised: Tensor = self.norm(self.out(read.transpose(1, 2).flatten(2)))
        added: Tensor = self.ffn(normalised)
        return normalised + added

    def extra_repr(self) -> str:
        """Show the settings."""
        names = ("student_width", "teacher_width", "query_size", "heads", "attention_scale")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _queries(self, student_map: Tensor, queries: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        """Return (N, L, teacher_width), or (1, L, teacher_width) from the table."""
        if queries is None:
            if self.table is None:
                raise ValueError("this projector has no table of queries: give queries, or build it with query_size")
            return _at_size(self.table, size or self.table.shape[2:]).flatten(2).transpose(1, 2)
        expected = (student_map.shape[0], self.teacher_width)
        if queries.ndim != 3 or (queries.shape[0], queries.shape[2]) != expected:
            raise ValueError(f"queries must have shape ({expected[0]}, L, {expected[1]}), got {tuple(queries.shape)}")
        return queries

    def _by_head(self, tokens: Tensor) -> Tensor:
        """Return (N, heads, L, width per head)."""
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


def check_heads(name: str, heads: int, teacher_width: int) -> None:
    """Raise ValueError unless the heads divide the teacher's width."""
    _checks.integer(name, heads, at_least=1)
    if teacher_width % heads:
        divisors = [number for number in range(1, teacher_width + 1) if teacher_width % number == 0]
        raise ValueError(f"{name} must divide the teacher's width {teacher_width}, one of {divisors}, got {heads}")


def _at_size(feature_map: Tensor, size: tuple[int, ...]) -> Tensor:
    """Interpolate a learned map (1, C, H, W), if its size is another one."""
    if tuple(feature_map.shape[2:]) == tuple(size):
        return feature_map
    return F.interpolate(feature_map, size=tuple(size), mode="bilinear", align_corners=False)


def _pair(name: str, size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"{name} must be (height, width), got {size!r}")
    for side in size:
        _checks.integer(name, side, at_least=1)
    return int(size[0]), int(size[1])
