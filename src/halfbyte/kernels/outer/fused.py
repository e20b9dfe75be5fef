"""Triton: up to `MEMBERS` products bigᵀ small in one launch, bound by the one reading of each `big`.

A program takes COLUMNS columns of one member and a part of the tokens. Parts leave their sums in fp32 scratch; the one that comes
last adds them up in order and then to the total: no atomics on numbers, the same bits in every run. The counters of who came last
return to zero with the launch; each stream has its own.

Letters: T tokens, n columns of a member, r its rank, WIDTH the widest rank rounded up.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize.fused import INTERPRETED
from halfbyte.kernels.outer.reference import Outer

MEMBERS = 4
"""Of a launch."""
stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


class Tile(NamedTuple):
    """columns: of a program. rows: tokens of a step. programs: to aim at, by splitting T. stages: steps loaded at once."""

    columns: int = 128
    rows: int = 64
    programs: int = 528
    warps: int = 4
    stages: int = 4


@triton.jit
def _sums(
    big, small, big_stride, small_stride, n, r, column, begin, T,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """bigᵀ small `[COLUMNS, WIDTH]` over SPAN tokens from `begin` on."""
    total = tl.zeros((column.shape[0], WIDTH), tl.float32)
    rank = tl.arange(0, WIDTH)[None, :]
    for start in tl.range(0, SPAN, ROWS, num_stages=STAGES):
        row = tl.arange(0, ROWS)[:, None] + (begin.to(tl.int64) + start)
        x = tl.load(big + row * big_stride + column[None, :], mask=(row < T) & (column[None, :] < n), other=0.0)
        y = tl.load(small + row * small_stride + rank, mask=(row < T) & (rank < r), other=0.0)
        if INTERPRETED:  # which takes bfloat16 for integers
            total = tl.dot(tl.trans(x.to(tl.float32)), y.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(tl.trans(x), y, total)
    return total


@triton.jit
def _add_up(sums, scratch, arrived, block, part, SPLITS: tl.constexpr):
    """(the sums over all parts of a block, whether this program is the block's last): only the last one's sums are whole."""
    COLUMNS: tl.constexpr = sums.shape[0]
    WIDTH: tl.constexpr = sums.shape[1]
    at = scratch + block.to(tl.int64) * (SPLITS * COLUMNS * WIDTH)
    at += tl.arange(0, COLUMNS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(at + part * (COLUMNS * WIDTH), sums)
    # All threads' sums stand before the one thread that counts says so.
    tl.debug_barrier()
    last = tl.atomic_add(arrived + block, 1, sem="acq_rel") == SPLITS - 1
    if last:
        sums = tl.zeros((COLUMNS, WIDTH), tl.float32)
        for _ in tl.static_range(SPLITS):
            sums += tl.load(at, cache_modifier=".cg")
            at += COLUMNS * WIDTH
        tl.store(arrived + block, 0)
    return sums, last


@triton.jit(do_not_specialize=["T"])
def _outer(
    total0, total1, total2, total3, big0, big1, big2, big3, small0, small1, small2, small3, scratch, arrived,
    big_stride0, big_stride1, big_stride2, big_stride3, small_stride0, small_stride1, small_stride2, small_stride3,
    n0, n1, n2, n3, r0, r1, r2, r3, scale0, scale1, scale2, scale3, T,
    COUNT: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """COUNT members behind each other along the grid. SPAN: tokens of a part."""
    block, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    total, big, small, big_stride, small_stride, n, r, scale = total0, big0, small0, big_stride0, small_stride0, n0, r0, scale0
    tile, first = block, tl.cdiv(n0, COLUMNS)
    if COUNT > 1:
        if block >= first:
            total, big, small, big_stride, small_stride = total1, big1, small1, big_stride1, small_stride1
            n, r, scale, tile = n1, r1, scale1, block - first
        first += tl.cdiv(n1, COLUMNS)
    if COUNT > 2:
        if block >= first:
            total, big, small, big_stride, small_stride = total2, big2, small2, big_stride2, small_stride2
            n, r, scale, tile = n2, r2, scale2, block - first
        first += tl.cdiv(n2, COLUMNS)
    if COUNT > 3:  # noqa: SIM102 (the first `if` is the compiler's)
        if block >= first:
            total, big, small, big_stride, small_stride = total3, big3, small3, big_stride3, small_stride3
            n, r, scale, tile = n3, r3, scale3, block - first
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    sums = _sums(big, small, big_stride, small_stride, n, r, column, part * SPAN, T, SPAN, WIDTH, ROWS, STAGES, INTERPRETED)
    last = True
    if SPLITS > 1:
        sums, last = _add_up(sums, scratch, arrived, block, part, SPLITS)
    if last:
        rank = tl.arange(0, WIDTH)[None, :]
        at = total + (column[:, None].to(tl.int64) * r + rank)
        inside = (column[:, None] < n) & (rank < r)
        tl.store(at, tl.load(at, mask=inside, other=0.0) + sums * scale, mask=inside)


@functools.cache
def _counters(device: torch.device, stream: int, size: int) -> Tensor:
    """int32 zeros. Every launch leaves them as it found them."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def outer(products: Sequence[Outer], tile: Tile | None = None) -> None:
    """See `halfbyte.kernels.outer.outer`; ranks up to `WIDEST`, 16-bit operands. tile: measured otherwise."""
    tile = tile or Tile()
    for i in range(0, len(products), MEMBERS):
        _launch(products[i : i + MEMBERS], tile)


def _launch(products: Sequence[Outer], tile: Tile) -> None:
    count, big = len(products), products[0].big
    tokens = big.shape[0]
    if not tokens:
        return
    totals, bigs, smalls, scales = zip(*products, strict=True)
    widths, ranks = [x.shape[1] for x in bigs], [x.shape[1] for x in smalls]
    assert all(x.shape[0] == tokens and x.stride(1) == 1 for x in (*bigs, *smalls)), "operands differ in tokens, or are transposed"
    blocks = sum(triton.cdiv(n, tile.columns) for n in widths)
    width = max(triton.next_power_of_2(max(ranks)), 16)
    # Powers of two: rows of many lengths share few compiled kernels, at the price of parts without tokens.
    whole = triton.next_power_of_2(triton.cdiv(tokens, tile.rows))
    splits = min(triton.next_power_of_2(triton.cdiv(tile.programs, blocks)), whole)
    scratch = arrived = None
    if splits > 1:
        scratch = torch.empty(blocks * splits * tile.columns * width, dtype=torch.float32, device=big.device)
        stream = stream_of(big.get_device()) if big.is_cuda else 0
        arrived = _counters(big.device, stream, max(triton.next_power_of_2(blocks), 4096))
    none, zero = [None] * (MEMBERS - count), [0] * (MEMBERS - count)
    _outer[(blocks * splits,)](
        *totals, *none, *bigs, *none, *smalls, *none, scratch, arrived,
        *[x.stride(0) for x in bigs], *zero, *[x.stride(0) for x in smalls], *zero,
        *widths, *zero, *ranks, *zero, *scales, *[0.0] * len(none), tokens,
        count, whole // splits * tile.rows, width, tile.columns, tile.rows, splits, tile.stages, INTERPRETED,
        num_warps=tile.warps,
    )  # fmt: skip
