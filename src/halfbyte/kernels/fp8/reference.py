"""The reference: weights, rows and products in e4m3, written down. What the Triton twin equals bit for bit, but for the product.

    e4m3(v) = v rounded to the nearest of the 254 finite numbers (ties to even), saturating at +-448

Letters: T = tokens, N = rows of all members, K = width, R = ranks of the group (padded), B = weights a scale covers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Packed
from halfbyte.formats.packing import unpack_nibbles
from halfbyte.kernels.dequantize import reference as dequantize
from halfbyte.kernels.fp8.parts import HEADROOM, LARGEST, TINY, Plan, Rows, Weight

if TYPE_CHECKING:
    from halfbyte.kernels.augmented import Group


def e4m3(x: Tensor) -> Tensor:
    """fp32 to `float8_e4m3fn`; NaN stays NaN."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as two e4m3 numbers whose sum has twice the digits."""
    high = e4m3(x)
    return high, e4m3(x.clamp(-LARGEST, LARGEST) - high.float())


def over(number: float, x: Tensor) -> Tensor:
    """number / x in one rounding: torch makes two of it (a reciprocal, a product)."""
    return torch.full_like(x, number) / x


def quantize_rows(x: Tensor, out8: Tensor, scale: Tensor, small: Tensor | None = None) -> None:
    """out8 = e4m3(x / scale) with scale = amax(row) / 448; `small` counts too, in units of 16."""
    wide = x.float()
    top = wide.abs().amax(1, keepdim=True).clamp_min(TINY)
    if small is not None:
        top = torch.maximum(top, small.float().abs().amax(1, keepdim=True) * (1 / HEADROOM))
    out8.copy_(e4m3(wide * over(LARGEST, top)))
    scale.copy_(top * (1 / LARGEST))


def fill_tail(rows: Rows, small: Tensor) -> None:
    """The adapter's columns of a row, [high | low | high] of small / (16 scale)."""
    high, low = pair(small.float() * over(1 / HEADROOM, rows.scale))
    rows.tail.copy_(torch.cat([high.float(), low.float(), high.float()], 1))


def quantize_both(x: Tensor, small: Tensor, rows: Rows) -> None:
    """Both of them, with a scale that serves both."""
    quantize_rows(x, rows.main, rows.scale, small)
    fill_tail(rows, small)


def adapters(group: Group) -> tuple[Tensor, Tensor]:
    """fp32 s*B `[N, R]`, block structured, and A `[R, K]`."""
    device = group.device
    sb = torch.zeros(group.rows, group.rank, device=device)
    a = torch.zeros(group.rank, group.width, device=device)
    for m, rows, ranks in zip(group.members, group.row_slices, group.rank_slices, strict=True):
        if m.lora is not None and ranks is not None:
            sb[rows, ranks] = m.lora.scale * m.lora.b.detach().float()
            a[ranks] = m.lora.a.detach().float()
    return sb, a


def _bounds(bound: Tensor, small: Tensor) -> Tensor:
    """The largest number of each row of the weight, adapter columns included."""
    return bound if not small.numel() else torch.maximum(bound, HEADROOM * small.abs().amax(1))


def inverse(bound: Tensor) -> Tensor:
    """1 / scale."""
    return over(LARGEST, bound.clamp_min(TINY))


def _write(weight: Weight, values: Tensor, small: Tensor, bound: Tensor) -> None:
    """values: fp32 `[rows, columns]`; small: fp32 `[rows, R]`; bound `[rows]`."""
    high, low = pair(small * (HEADROOM * inverse(bound)[:, None]))
    weight.scale.copy_(bound.clamp_min(TINY)[None] * (1 / LARGEST))
    columns = values.shape[1]
    weight.data[:, :columns] = e4m3(values)
    weight.data[:, columns:] = torch.cat([high.float(), high.float(), low.float()], 1).to(torch.float8_e4m3fn)


def _levels(weight: Packed) -> Tensor:
    """fp32 `[N, K]`: what the codes stand for."""
    book = formats.BOOKS[weight.format.kind].levels.to(weight.codes.device)
    return book[unpack_nibbles(weight.codes, weight.numel).int()].view(weight.shape)


def _scales(weight: Packed) -> Tensor:
    """fp32 `[N, K]`: the scale of every weight."""
    return formats.scales_of(weight).repeat_interleave(weight.format.block).view(weight.shape)


def _scaled_weight(group: Group, plan: Plan, by: Tensor) -> Tensor:
    """fp32 `[N, K]`: the weights times `by` `[N, K]`, the inverse scales; what e4m3 then rounds.

    A codebook weight is level * (absmax * inverse): the scale of a block is multiplied first, as the fast twin does.
    """
    parts = []
    for m, rows, fast in zip(group.members, group.row_slices, plan.fast, strict=True):
        weight = m.weight
        if fast:
            assert isinstance(weight, Packed)
            parts.append(_levels(weight) * (_scales(weight) * by[rows]))
        else:
            dense = dequantize.decode_new(weight, torch.bfloat16) if isinstance(weight, Packed) else weight.detach()
            parts.append(dense.float() * by[rows])
    return torch.cat(parts)


def forward_weight(group: Group, plan: Plan, weight: Weight, a: Tensor) -> None:
    """`[W | s*B]` into weight `[N, K + 3R]`, with a scale a row; A into `a` `[R, K]`."""
    sb, wide_a = adapters(group)
    bound = _bounds(plan.bound_N, sb)
    _write(weight, _scaled_weight(group, plan, inverse(bound)[:, None].expand(-1, group.width)), sb, bound)
    a.copy_(wide_a)


def backward_weight(group: Group, plan: Plan, weight: Weight, sb: Tensor) -> None:
    """`[W ; A]` transposed into weight `[K, N + 3R]`, with a scale a span of columns of W; s*B into `sb` `[N, R]`."""
    wide_sb, a = adapters(group)
    bound = _bounds(plan.bound_K, a.T)
    bound = bound.view(-1, plan.span).amax(1).repeat_interleave(plan.span)
    _write(weight, _scaled_weight(group, plan, inverse(bound)[None].expand(group.rows, -1)).T, a.T, bound)
    sb.copy_(wide_sb)


def product(
    rows: Rows, weight: Weight, bias: Tensor | None, columns: int | None, out: Tensor, residual: Tensor | None = None
) -> None:
    """out = rows · weightᵀ with both scales + bias + residual, in fp32 and one rounding; `columns`: of the operands."""
    left, right = rows.data[:, :columns].float(), weight.data[:, :columns].float()
    y = (left @ right.T) * rows.scale * weight.scale
    y = y if bias is None else y + bias.float()
    out.copy_(y if residual is None else y + residual.float())
