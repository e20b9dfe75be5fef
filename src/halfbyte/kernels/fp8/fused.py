"""The Triton twin of everything small: rows to e4m3, the adapter's columns behind rows, and the adapters beside a weight.

Each is one launch. A row is read once and stays in registers between finding its largest number and rounding (up to 32,768
columns; longer rows are read twice, the second time mostly from cache).

Letters: T = tokens, N = rows of all members, K = width, R = ranks of the group (padded).
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.fp8.parts import HEADROOM, LARGEST, TINY, Plan, Rows, Weight
from halfbyte.kernels.fp8.rounding import rest, to_bits

if TYPE_CHECKING:
    from halfbyte.kernels.augmented import Group

LONGEST = 32768
"""Columns of a row that stay in registers."""
NUMBERS = {"LARGEST": LARGEST, "TINY": TINY, "HEADROOM": HEADROOM, "INTERPRETED": INTERPRETED}


@triton.jit
def _store_tail(at, v, mask, R, INTERPRETED: tl.constexpr):
    """[high | low | high] of v. NaN stays in the high part."""
    high = to_bits(v, INTERPRETED)
    tl.store(at, high, mask=mask)
    tl.store(at + R, to_bits(rest(v), INTERPRETED), mask=mask)
    tl.store(at + 2 * R, high, mask=mask)


@triton.jit
def _quantize(
    x, out, scale, small, K, R, x_stride, out_stride, small_stride,
    LOOPS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr, HEADROOM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A row a program, with the adapter's columns behind it if COLUMNS."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    k = tl.arange(0, BLOCK)
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    top = tl.abs(v)
    for i in range(1, LOOPS):
        top = tl.maximum(top, tl.abs(tl.load(x + k + i * BLOCK, mask=k + i * BLOCK < K, other=0.0).to(tl.float32)))
    most = tl.maximum(tl.max(top, 0), TINY)
    if COLUMNS:
        c = tl.arange(0, COLUMNS)
        xa = tl.load(small + row * small_stride + c, mask=c < R, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(xa), 0) * (1.0 / HEADROOM))
    inverse = tl.div_rn(LARGEST, most)
    row_scale = most * (1.0 / LARGEST)
    tl.store(scale + row, row_scale)
    tl.store(out + k, to_bits(v * inverse, INTERPRETED), mask=k < K)
    for i in range(1, LOOPS):
        at = k + i * BLOCK
        v = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        tl.store(out + at, to_bits(v * inverse, INTERPRETED), mask=at < K)
    if COLUMNS:
        _store_tail(out + K + c, xa * tl.div_rn(1.0 / HEADROOM, row_scale), c < R, R, INTERPRETED)


def quantize_rows(x: Tensor, out8: Tensor, scale: Tensor, small: Tensor | None = None, warps: int = 0) -> None:
    """See `kernels.fp8.quantize_rows`; with `small` `[T, R]` also the columns behind out8 (`kernels.fp8.quantize_both`)."""
    tokens, width = x.shape
    block = min(max(triton.next_power_of_2(width), 16), LONGEST)  # Triton 3.6 cannot reduce a row of one
    rank = 0 if small is None else small.shape[1]
    _quantize[(tokens,)](
        x, out8.view(torch.uint8), scale, x if small is None else small, width, rank, x.stride(0), out8.stride(0),
        0 if small is None else small.stride(0), LOOPS=triton.cdiv(width, block), BLOCK=block,
        COLUMNS=triton.next_power_of_2(rank) if rank else 0, **NUMBERS, num_warps=warps or min(max(block // 1024, 1), 16),
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _tail(
    out, small, scale, T, R, out_stride, small_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEADROOM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[high | low | high] of small / (16 scale), ROWS rows."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    mask = (t < T) & (c < R)
    v = tl.load(small + t * small_stride + c, mask=mask, other=0.0).to(tl.float32)
    v = v * tl.div_rn(1.0 / HEADROOM, tl.load(scale + t, mask=t < T, other=1.0))
    _store_tail(out + t * out_stride + c, v, mask, R, INTERPRETED)


def fill_tail(rows: Rows, small: Tensor) -> None:
    """See `kernels.fp8.fill_tail`."""
    tokens, rank = small.shape
    columns = triton.next_power_of_2(rank)
    height = max(2048 // columns, 1)
    _tail[(triton.cdiv(tokens, height),)](
        rows.tail.view(torch.uint8), small, rows.scale, tokens, rank, rows.tail.stride(0), small.stride(0),
        ROWS=height, COLUMNS=columns, HEADROOM=HEADROOM, INTERPRETED=INTERPRETED, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _own_b(where, n0, c, R, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """fp32 s*B of ROWS rows of one member, `[ROWS, COLUMNS]`. where: a, b, rank, first column, rows up to and with it, s."""
    member = 0
    for i in tl.static_range(0, COUNT - 1):
        member += (n0 >= tl.load(where + i * 6 + 4)).to(tl.int32)
    entry = where + member * 6
    b = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    rank = tl.load(entry + 2)
    column = c - tl.load(entry + 3)
    before = tl.load(where + tl.maximum(member - 1, 0) * 6 + 4) * tl.where(member > 0, 1, 0)
    row = n0 - before + tl.arange(0, ROWS)[:, None]
    s = tl.load(entry + 5).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.load(b + row * rank + column, mask=(column >= 0) & (column < rank) & (c < R), other=0.0) * s


@triton.jit
def _own_a(where, k, c, K, COUNT: tl.constexpr):
    """fp32 A at columns k (any shape) and rows c of the stack, zero where nobody has an adapter. k and c broadcast."""
    found = (k + c).to(tl.float32) * 0.0
    for i in tl.static_range(0, COUNT):
        a = tl.load(where + i * 6).to(tl.pointer_type(tl.float32))
        row = c - tl.load(where + i * 6 + 3)
        found += tl.load(a + row * K + k, mask=(row >= 0) & (row < tl.load(where + i * 6 + 2)) & (k < K), other=0.0)
    return found


@triton.jit
def _store_pairs(at, v, mask, R, INTERPRETED: tl.constexpr):
    """[high | high | low] of v."""
    high = to_bits(v, INTERPRETED)
    tl.store(at, high, mask=mask)
    tl.store(at + R, high, mask=mask)
    tl.store(at + 2 * R, to_bits(rest(v), INTERPRETED), mask=mask)


@triton.jit
def _adapters(
    out, scale, inverse, changed, bound, plain, where, N, K, R, stride, row_programs,
    BACK: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr, HEADROOM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """First programs: ROWS rows of s*B; the others: SPAN columns of A. One of the two goes beside the weight in pairs, with the
    scales of the weight (forward s*B, BACK A), the other is only cast into `plain`. changed: None, or where to say which of the
    inverse scales are not what they were."""
    pid = tl.program_id(0)
    c = tl.arange(0, COLUMNS)[None, :]
    if pid < row_programs:
        n0 = pid.to(tl.int64) * ROWS
        n = n0 + tl.arange(0, ROWS)
        sb = _own_b(where, n0, c, R, ROWS, COUNT)
        if BACK:
            tl.store(plain + n[:, None] * R + c, to_dtype(sb, plain.dtype.element_ty, INTERPRETED), mask=c < R)
        else:
            top = tl.maximum(tl.maximum(tl.load(bound + n), HEADROOM * tl.max(tl.abs(sb), 1)), TINY)
            inverse_n = tl.div_rn(LARGEST, top)
            if changed is not None:
                tl.store(changed + n, (tl.load(inverse + n) != inverse_n).to(tl.int32))
            tl.store(inverse + n, inverse_n)
            tl.store(scale + n, top * (1.0 / LARGEST))
            _store_pairs(out + n[:, None] * stride + K + c, sb * (HEADROOM * inverse_n)[:, None], c < R, R, INTERPRETED)
    else:
        span = (pid - row_programs).to(tl.int64)
        k = span * SPAN + tl.arange(0, SPAN)
        a = _own_a(where, k[:, None], c.to(tl.int64), K, COUNT)
        if BACK:
            most = tl.max(tl.max(tl.abs(a), 1), 0)
            top = tl.maximum(tl.maximum(tl.load(bound + span * SPAN), HEADROOM * most), TINY)
            inverse_k = tl.div_rn(LARGEST, top)
            if changed is not None:
                tl.store(changed + span, (tl.load(inverse + span) != inverse_k).to(tl.int32))
            tl.store(inverse + span, inverse_k)
            tl.store(scale + k, tl.zeros([SPAN], tl.float32) + top * (1.0 / LARGEST))
            _store_pairs(out + k[:, None] * stride + N + c, a * (HEADROOM * inverse_k), c < R, R, INTERPRETED)
        else:
            tl.store(plain + c * K + k[:, None], to_dtype(a, plain.dtype.element_ty, INTERPRETED), mask=c < R)


ROWS = 16
"""Rows of s*B a program: every member's rows are a multiple of it."""


def adapters(group: Group, plan: Plan, weight: Weight, plain: Tensor, table: Tensor, back: bool) -> None:
    """Writes the adapter's columns, the scales and the inverse scales of `weight`, and `plain`."""
    rows, spans = group.rows // ROWS, group.width // plan.span
    _adapters[(rows + spans,)](
        weight.data.view(torch.uint8), weight.scale, weight.inverse, weight.changed, 
        plan.bound_K if back else plan.bound_N, plain, table,
        group.rows, group.width, group.rank, weight.data.stride(0), rows,
        BACK=back, SPAN=plan.span, ROWS=ROWS, COLUMNS=max(triton.next_power_of_2(group.rank), 4), COUNT=len(group.members),
        **NUMBERS, enable_fp_fusion=False,
    )  # fmt: skip


def adapter_table(group: Group) -> Tensor:
    """int64 `[members, 6]` for `_adapters`: a, b, rank, first column, rows up to and with the member, bits of s."""
    entries = []
    for m, rows, ranks in zip(group.members, group.row_slices, group.rank_slices, strict=True):
        if m.lora is None or ranks is None:
            entries.append([0, 0, 0, 0, rows.stop, 0])
            continue
        a, b = m.lora.a, m.lora.b
        assert a.dtype == b.dtype == torch.float32 and a.is_contiguous() and b.is_contiguous(), "masters are fp32"
        bits = int(torch.tensor(m.lora.scale, dtype=torch.float32).view(torch.int32))
        entries.append([a.data_ptr(), b.data_ptr(), a.shape[0], ranks.start, rows.stop, bits])
    return torch.tensor(entries, dtype=torch.int64).to(group.device)
