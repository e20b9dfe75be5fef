"""The Triton twin: one launch a weight, nested scales decoded inside, bit-equal to the reference.

A tile is a few spans of neighbouring weights that share a scale: the scale is read (and, if nested, decoded) once a span, not
once a weight. Codebook formats are the case of one long row. Levels come from a table of 64 bytes, half a cache line: all lanes of
a warp hit the same line. Products and sums must not be contracted to one rounding (`enable_fp_fusion=False`), or nested scales and
int4 minima would differ from the reference in the last bit. Offsets are int64: weights may have more than 2^31 elements.

Letters: N = rows, K = elements a row, G = groups a row, R = spans a tile, S = weights a span.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.formats.packed import NESTED_BLOCK, Packed, matrix_shape
from halfbyte.kernels.dequantize.levels import levels, nested_levels
from halfbyte.kernels.dequantize.words import INTERPRETED, columns_of_tile, decode_tile, suits, table, tiling_of, to_dtype

__all__ = ["INTERPRETED", "decode", "to_dtype"]

TILE = 4096
"""Weights a program decodes."""


@triton.jit
def _scales(scales, nested_scales, nested_offset, nested_levels, index, mask, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr):
    """fp32 scales at `index`: stored so, or level(code) * scale2 + offset (two roundings)."""
    if NESTED:
        code = tl.load(scales + index, mask=mask, other=0).to(tl.int32)
        outer = tl.load(nested_scales + index // NESTED_BLOCK, mask=mask, other=0.0)
        return tl.load(nested_levels + code) * outer + tl.load(nested_offset)
    else:
        return tl.load(scales + index, mask=mask, other=0.0)


@triton.jit
def _four_bit(
    out, codes, scales, nested_scales, nested_offset, zeros, table, nested_levels,
    N, K, row_bytes, groups, spans,
    KIND: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """R spans of SPAN weights, HALF = SPAN / 2 bytes rounded up to a power of two. KIND: codebook, none, int, float, min."""
    span = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row = span // spans
    column = span % spans
    alive = row < N
    group = row * groups + column * SPAN // BLOCK
    s = _scales(scales, nested_scales, nested_offset, nested_levels, group, alive, NESTED, NESTED_BLOCK)[:, None]

    # Offsets and masks are written so that the compiler sees runs of neighbours: it then moves 16 bytes at a time.
    byte = tl.arange(0, HALF)[None, :]
    at = column[:, None] * (SPAN // 2) + byte
    inside = alive[:, None] & (at < row_bytes)
    element = tl.arange(0, 2 * HALF)[None, :]
    k = column[:, None] * SPAN + element
    mask = alive[:, None] & (k < K)
    if 2 * HALF != SPAN:
        inside = inside & (byte < SPAN // 2)
        mask = mask & (element < SPAN)
    both = tl.load(codes + row[:, None] * row_bytes + at, mask=inside, other=0).to(tl.int32)
    high, low = both >> 4, both & 15
    if KIND == "codebook":
        first_w, second_w = tl.load(table + high) * s, tl.load(table + low) * s
    elif KIND == "none":
        first_w, second_w = (high - 8).to(tl.float32) * s, (low - 8).to(tl.float32) * s
    else:
        z = tl.load(zeros + group, mask=alive, other=0.0)[:, None]
        if KIND == "min":
            first_w, second_w = high.to(tl.float32) * s + z, low.to(tl.float32) * s + z
        else:
            first_w, second_w = (high.to(tl.float32) - z) * s, (low.to(tl.float32) - z) * s
    tl.store(out + row[:, None] * K + k, to_dtype(tl.interleave(first_w, second_w), out.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _eight_bit(out, codes, scales, K, tiles, TILE: tl.constexpr, INTERPRETED: tl.constexpr):
    """TILE weights of one row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    k = (program % tiles) * TILE + tl.arange(0, TILE)
    q = tl.load(codes + row * K + k, mask=k < K, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    tl.store(out + row * K + k, to_dtype(q * tl.load(scales + row), out.dtype.element_ty, INTERPRETED), mask=k < K)


@triton.jit(do_not_specialize=["codes", "scales", "nested_scales", "nested_offset", "zeros", "N", "K", "tiles"])
def _words(
    out, codes, scales, nested_scales, nested_offset, zeros, table, nested_levels, N, K, tiles,
    ZERO: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, LOOKUP: tl.constexpr, POLICY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile a program of a contiguous [N, K], `tiles` a row."""
    program = tl.program_id(0).to(tl.uint32)
    row_tile = program // tiles.to(tl.uint32)
    row = row_tile.to(tl.int64) * ROWS
    column = (program - row_tile * tiles.to(tl.uint32)).to(tl.int32) * COLUMNS
    first = row * (K // 8 * 8) + column
    decode_tile(
        out + first, codes.to(tl.pointer_type(tl.int32)), scales, nested_scales, nested_offset, zeros, table, nested_levels,
        first, K, K, tl.minimum(N - row, ROWS).to(tl.int32), K - column,
        ZERO, NESTED, BLOCK, ROWS, COLUMNS, EVEN, LOOKUP, POLICY, INTERPRETED,
    )  # fmt: skip


_runs: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
"""By all that a compiled `_words` and its grid depend on: what launches it, and its last arguments."""


def _decode_words(packed: Packed, out: Tensor, rows: int, width: int) -> None:
    """The fast way. A Triton launch costs 30 us of looking up what to run; the second of its kind goes straight to it."""
    fmt = packed.format
    key = (fmt, rows, width, out.dtype, out.get_device())
    known = _runs.get(key)
    if known is not None:
        # Addresses in place of tensors: the launcher would ask the driver about each.
        known[0](out.data_ptr(), *[t.data_ptr() for t in packed.tensors()], *known[1])
        return
    scales = packed.scales if fmt.nested else packed.scales.view(torch.float32)
    stored = (
        packed.codes, scales,
        packed.nested_scales.view(torch.float32) if fmt.nested else scales,
        packed.nested_offset.view(torch.float32) if fmt.nested else scales,
        scales if fmt.zero == "none" else packed.zeros.view(torch.float32),
    )  # fmt: skip
    device = str(out.device)
    tiling = tiling_of(fmt, device)
    columns = columns_of_tile(width, tiling.columns)
    tile_rows = tiling.weights // columns
    tiles = triton.cdiv(width, columns)
    levels_16 = table(fmt, device)
    tables = (levels_16, nested_levels(device) if fmt.nested else levels_16)
    numbers = (rows, width, tiles)
    constants = {
        "ZERO": fmt.zero, "NESTED": fmt.nested, "BLOCK": fmt.block, "ROWS": tile_rows, "COLUMNS": columns,
        "EVEN": width % columns == 0, "LOOKUP": tiling.lookup, "POLICY": tiling.policy, "INTERPRETED": INTERPRETED,
    }  # fmt: skip
    grid = (triton.cdiv(rows, tile_rows) * tiles, 1, 1)
    compiled = _words[grid](out, *stored, *tables, *numbers, **constants, num_warps=tiling.warps, enable_fp_fusion=False)
    if compiled is not None:
        _runs[key] = (compiled[grid], (*(t.data_ptr() for t in tables), *numbers, *constants.values()))


def decode(packed: Packed, out: Tensor) -> None:
    """Writes the weight into `out` (contiguous, n elements, any float dtype)."""
    fmt, n = packed.format, packed.numel
    if n == 0:
        return
    codebook = fmt.kind in ("nf4", "fp4")
    rows, width = (n // 2048, 2048) if codebook and n % 2048 == 0 else matrix_shape(packed.shape)
    if suits(fmt, width) and packed.codes.data_ptr() % 4 == 0 and out.data_ptr() % 16 == 0:
        _decode_words(packed, out, rows, width)
    elif fmt.kind == "int8":
        _decode_eight(packed, out)
    else:
        _decode_four(packed, out)


def _decode_eight(packed: Packed, out: Tensor) -> None:
    rows, width = matrix_shape(packed.shape)
    tile = min(triton.next_power_of_2(width), TILE)
    tiles = triton.cdiv(width, tile)
    scales = packed.scales.view(torch.float32)
    _eight_bit[(rows * tiles,)](out, packed.codes, scales, width, tiles, TILE=tile, INTERPRETED=INTERPRETED)


def _decode_four(packed: Packed, out: Tensor) -> None:
    """Any width, any even block, any alignment."""
    fmt, n = packed.format, packed.numel
    scales = packed.scales if fmt.nested else packed.scales.view(torch.float32)
    codebook = fmt.kind in ("nf4", "fp4")
    rows, width = (1, n) if codebook else matrix_shape(packed.shape)
    groups = triton.cdiv(width, fmt.block)
    span = _span(fmt.block, width, groups)
    spans = triton.cdiv(width, span)
    half = triton.next_power_of_2(span // 2)
    tile_rows = max(TILE // (2 * half), 1)
    device = str(out.device)
    _four_bit[(triton.cdiv(rows * spans, tile_rows),)](
        out, packed.codes, scales,
        packed.nested_scales.view(torch.float32) if fmt.nested else scales,
        packed.nested_offset.view(torch.float32) if fmt.nested else scales,
        scales if fmt.zero == "none" else packed.zeros.view(torch.float32),
        levels(fmt.kind, device) if codebook else scales,
        nested_levels(device) if fmt.nested else scales,
        rows, width, triton.cdiv(width, 2), groups, spans,
        KIND="codebook" if codebook else fmt.zero, NESTED=fmt.nested, NESTED_BLOCK=NESTED_BLOCK,
        BLOCK=fmt.block, SPAN=span, HALF=half, R=tile_rows, INTERPRETED=INTERPRETED,
        enable_fp_fusion=False,
    )  # fmt: skip


def _span(block: int, width: int, groups: int) -> int:
    """Weights of a span: a block or, of a block beyond TILE, its largest even divisor; anything where a row has one group."""
    if groups == 1:
        return max(min(1 << (width - 1).bit_length(), 1024), 2)
    return next(d for d in range(min(block, TILE), 1, -1) if block % d == 0 and d % 2 == 0)
