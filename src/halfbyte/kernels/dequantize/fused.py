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

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.formats.packed import NESTED_BLOCK, Packed, matrix_shape
from halfbyte.kernels.dequantize.levels import levels, nested_levels

TILE = 4096
"""Weights a program decodes."""


INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def to_dtype(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 rounded to nearest, ties to even. Triton's interpreter truncates to bf16 (3.6), so there it is done on the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


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


def decode(packed: Packed, out: Tensor) -> None:
    """Writes the weight into `out` (contiguous, n elements, any float dtype)."""
    fmt, n = packed.format, packed.numel
    if n == 0:
        return
    scales = packed.scales if fmt.nested else packed.scales.view(torch.float32)
    if fmt.kind == "int8":
        rows, width = matrix_shape(packed.shape)
        tile = min(triton.next_power_of_2(width), TILE)
        tiles = triton.cdiv(width, tile)
        _eight_bit[(rows * tiles,)](out, packed.codes, scales, width, tiles, TILE=tile, INTERPRETED=INTERPRETED)
        return
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
