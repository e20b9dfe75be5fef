"""The Triton twin: mask and product in one pass over x, the same bits as the reference."""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.dropout.reference import threshold

QUADS = 512
"""Counters a program: four elements each."""


@triton.jit
def _dropout(
    out, x, state, layer, cut, inverse, per_row, size, rows, tiles, skipped, first, QUADS: tl.constexpr, INTERPRETED: tl.constexpr
):  # per_row = tokens * K elements of a full row, size = T * K elements in all, behind `rows` rows and `skipped` elements
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    tile = first + program % tiles
    quad = tile * QUADS + tl.arange(0, QUADS)
    seed, step, first_row = tl.load(state), tl.load(state + 1), tl.load(state + 2) + rows
    zero = quad * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        quad.to(tl.uint32),
        (zero + first_row + row).to(tl.uint32),
        (zero + layer).to(tl.uint32),
        (zero + step).to(tl.uint32),
    )
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int64)
    element = tile * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    offset = row * per_row + element - skipped
    inside = (element < per_row) & (offset < size) & (offset >= 0)
    kept = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) * inverse
    tl.store(out + offset, to_dtype(tl.where(word >= cut, kept, 0.0), out.dtype.element_ty, INTERPRETED), mask=inside)


def dropout(x: Tensor, state: Tensor, p: float, tokens: int, layer: int, start: int = 0) -> Tensor:
    """x `[T, K]`, the positions from `start` on: x / (1 - p) where the mask keeps it, else 0."""
    x = x.contiguous()
    out = torch.empty_like(x)
    length, width = x.shape
    rows, skipped = divmod(start, tokens)
    tile, within = 4 * QUADS, min(skipped + length, tokens) * width
    # Within one row only its tiles run; else whole rows do, the first of them too.
    first = skipped * width // tile if skipped + length <= tokens else 0
    tiles = triton.cdiv(within, tile) - first
    grid = (tiles * triton.cdiv(skipped + length, tokens),)
    _dropout[grid](
        out, x, state, layer, threshold(p), 1.0 / (1.0 - p), tokens * width, x.numel(), rows, tiles, skipped * width, first,
        QUADS=QUADS, INTERPRETED=INTERPRETED,
    )  # fmt: skip
    return out
