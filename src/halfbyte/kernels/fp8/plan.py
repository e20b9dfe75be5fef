"""What is found out once about a group's frozen weights: how large they are, and whether they decode straight to e4m3.

The bound of a packed weight is known from its scales: no codebook weight is larger than its block's scale. Nothing is read back to
the host; a plan is kept in the group and made again when a weight has moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Format, Packed
from halfbyte.kernels.dequantize import decode
from halfbyte.kernels.fp8.parts import ALIGNED, Plan

if TYPE_CHECKING:
    from halfbyte.kernels.augmented import Group

SPAN = 64
"""Columns that share a scale when the weight is transposed, where the format's block allows it."""


def why_not(group: Group) -> str | None:
    """Why a group cannot be multiplied in fp8, or None."""
    for m in group.members:
        if m.weight.shape[0] % ALIGNED or m.weight.shape[1] % ALIGNED:
            return f"a weight of {m.weight.shape[0]} x {m.weight.shape[1]} is no multiple of {ALIGNED} both ways"
    return None


def of(group: Group) -> Plan:
    """The group's plan, made at its first use."""
    key = _key(group)
    found = group.float8
    if not isinstance(found, Plan) or found.key != key:
        found = _make(group, key)
        group.float8 = found
    return found


def _key(group: Group) -> tuple[int, ...]:
    found = []
    for m in group.members:
        found.append((m.weight.codes if isinstance(m.weight, Packed) else m.weight).data_ptr())
        if m.lora is not None:
            found += [m.lora.a.data_ptr(), m.lora.b.data_ptr()]
    return tuple(found)


def _make(group: Group, key: tuple[int, ...]) -> Plan:
    book = next((m.weight.format for m in group.members if _is_fast(m.weight, None) and isinstance(m.weight, Packed)), None)
    fast = tuple(_is_fast(m.weight, book) for m in group.members)
    span = ALIGNED if book is None else min(book.block, SPAN)
    rows, columns = zip(*(_bounds(m.weight, f) for m, f in zip(group.members, fast, strict=True)), strict=True)
    bound_K = torch.stack(columns).amax(0)
    bound_K = bound_K.view(-1, span).amax(1).repeat_interleave(span)
    return Plan(torch.cat(rows), bound_K, span, fast, book, key)


def _is_fast(weight: Packed | Tensor, book: Format | None) -> bool:
    """A codebook format of whole blocks a row, and the same as the group's first such one."""
    if not isinstance(weight, Packed) or weight.format.kind not in ("nf4", "fp4"):
        return False
    return weight.shape[1] % weight.format.block == 0 and book in (None, weight.format)


def _bounds(weight: Packed | Tensor, fast: bool) -> tuple[Tensor, Tensor]:
    """fp32 `[N]` and `[K]`: the largest of every row and column, or a little more."""
    if fast and isinstance(weight, Packed):
        top = float(formats.BOOKS[weight.format.kind].levels.abs().max())
        scales = formats.scales_of(weight).view(weight.shape[0], -1).abs() * top
        return scales.amax(1), scales.amax(0).repeat_interleave(weight.format.block)
    dense = (decode(weight, torch.bfloat16) if isinstance(weight, Packed) else weight.detach()).abs()
    return dense.amax(1).float(), dense.amax(0).float()
