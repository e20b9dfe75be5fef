"""What the fp8 twins share: the numbers of e4m3, and how rows, weights and their adapters lie in memory.

Letters: T = tokens, N = rows of all members, K = width, R = ranks of the group (padded).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.formats.packed import Format

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest e4m3 number."""
TINY = 1e-30
"""A row whose largest number is below this becomes zeros."""
HEADROOM = 16.0
"""Adapter columns of activations are stored in units of 16 row scales, so they may be 16 times the row's largest number.

The weights' side is multiplied by as much. XA is some tenths of a row's largest number, s*B a hundredth of the weight's or less:
with 16 both sides sit in the middle of e4m3's range."""
COLUMNS = 3
"""Columns a rank takes: high·high + low·high + high·low of two numbers in two e4m3 each, which is as exact as bf16."""
ALIGNED = 16
"""What both dimensions of an fp8 product must be a multiple of."""


LINE = 128
"""Bytes: rows begin at the beginning of a cache line, or every load of a tile's row would touch two."""


def _lines(rows: int, columns: int, device: torch.device) -> Tensor:
    """e4m3 `[rows, columns]`, rows strided."""
    return torch.empty(rows, -(-columns // LINE) * LINE, dtype=E4M3, device=device)[:, :columns]


class Rows:
    """Activations or gradients in e4m3, a scale a row, room for the adapter's columns behind each row.

    data e4m3 `[T, width + 3R]`, rows in whole lines; main `[T, width]` and tail `[T, 3R]` are views of it; scale fp32 `[T, 1]`.
    """

    __slots__ = ("data", "main", "scale", "tail")

    def __init__(self, tokens: int, width: int, rank: int, device: torch.device) -> None:
        self.data = _lines(tokens, width + COLUMNS * rank, device)
        self.main, self.tail = self.data[:, :width], self.data[:, width:]
        self.scale = torch.empty(tokens, 1, dtype=torch.float32, device=device)


class Weight:
    """A scaled weight, one output a row: data e4m3 `[outputs, inner + 3R]`, rows in whole lines, scale fp32 `[1, outputs]`.

    inverse fp32 `[outputs]`: 1 / scale of rows (transposed: of spans, the rest is unused). changed int32 `[outputs]`, for a weight
    that is used again, else None: which of them the adapter beside the weight has changed since the last call.
    """

    __slots__ = ("changed", "data", "inverse", "scale")

    def __init__(self, outputs: int, inner: int, rank: int, device: torch.device, held: bool = False) -> None:
        self.data = _lines(outputs, inner + COLUMNS * rank, device)
        self.scale = torch.empty(1, outputs, dtype=torch.float32, device=device)
        self.inverse = torch.full((outputs,), float("nan"), device=device) if held else torch.empty(outputs, device=device)
        self.changed = torch.ones(outputs, dtype=torch.int32, device=device) if held else None

    @property
    def nbytes(self) -> int:
        """All of it, the rest of the last line of each row included."""
        tensors = (self.data, self.scale, self.inverse, self.changed)
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


@dataclass(frozen=True)
class Plan:
    """What is known of a group's frozen weights once: bounds of their sizes, and who is decoded how.

    bound_N fp32 `[N]`, bound_K fp32 `[K]`: no weight of that row (column) is larger; a column's bound is its span's.
    span: neighbouring columns of W that share a scale when W is transposed. fast: by member, decoded straight to e4m3
    (a codebook format in whole blocks), else by way of bf16. book: the format of the fast ones, None if there are none.
    key: addresses of all stored tensors, which the plan is good for. tables: what the fast twin adds, by its shape.
    """

    bound_N: Tensor
    bound_K: Tensor
    span: int
    fast: tuple[bool, ...]
    book: Format | None
    key: tuple[int, ...]
    tables: dict[object, object] = field(default_factory=dict)
