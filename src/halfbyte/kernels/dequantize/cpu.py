"""The CPU twin: a table of 256 bytes x 2 levels, then the span's scale. Bit-equal to the reference.

Why: a byte holds two codes, so one look-up yields two levels; and the pair of fp32 levels is moved as ONE 8-byte element, which
torch gathers four times as fast as a row of two. Measured (2 cores, 1536 x 576, nf4 nested to bf16): docs/concepts/kernels.md.
Only formats of two codes a byte have such a table; int8 is one product, which the reference does as well.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Packed, matrix_shape
from halfbyte.kernels.dequantize import reference
from halfbyte.kernels.dequantize.levels import levels

CHUNK = 1 << 20
"""Weights decoded at a time: bounds the fp32 scratch to 4 MiB. Smaller chunks measured slower (0.37 ms at 2^17, 0.28 at 2^20)."""


@functools.cache
def _pairs(kind: str) -> Tensor:
    """float64 `[256]`: entry b holds the bits of two fp32, the levels of the high and the low nibble of byte b.

    kind: nf4, fp4, "int4" (levels 0..15) or "symmetric" (levels -8..7).
    """
    first = {"int4": 0, "symmetric": -8}
    table = torch.arange(16, dtype=torch.float32) + first[kind] if kind in first else levels(kind)
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).contiguous().view(torch.float64).view(-1)


def _expand(codes: Tensor, kind: str) -> Tensor:
    """Bytes `[m]` to the fp32 levels `[2m]` of their nibbles (int4: the codes themselves)."""
    return _pairs(kind).index_select(0, codes.to(torch.int32)).view(torch.float32)


def decode(packed: Packed, out: Tensor) -> None:
    """Writes the weight into `out` (contiguous, n elements, any float dtype)."""
    if packed.format.kind in ("nf4", "fp4"):
        _codebook(packed, out.view(-1))
    elif packed.format.kind == "int4":
        _affine(packed, out.view(matrix_shape(packed.shape)))
    else:
        reference.decode(packed, out)


def _codebook(packed: Packed, out_n: Tensor) -> None:
    block, kind = packed.format.block, packed.format.kind
    scales = formats.scales_of(packed)
    whole = packed.numel // block
    step = max(CHUNK // block, 1)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        chunk = _expand(packed.codes[start * block // 2 : stop * block // 2], kind).view(-1, block)
        torch.mul(chunk, scales[start:stop, None], out=out_n[start * block : stop * block].view(-1, block))
    if whole * block < packed.numel:
        out_n[whole * block :] = (_expand(packed.codes[whole * block // 2 :], kind) * scales[whole])[: packed.numel - whole * block]


def _affine(packed: Packed, out_NK: Tensor) -> None:
    rows, width = out_NK.shape
    block, zero = packed.format.block, packed.format.zero
    codes = packed.codes.view(rows, -(-width // 2))
    scales = packed.scales.view(torch.float32).view(rows, -(-width // block))
    zeros = scales if zero == "none" else packed.zeros.view(torch.float32).view(scales.shape)
    whole = width // block
    # Whole groups, then the short one at the end of the rows.
    spans = [(0, whole * block, slice(0, whole)), (whole * block, width, slice(whole, None))]
    step = max(CHUNK // max(width, 1), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        levels_NK = _expand(codes[part].reshape(-1), "symmetric" if zero == "none" else "int4").view(codes[part].shape[0], -1)
        for first, last, group in spans:
            if first < last:
                shape = (levels_NK.shape[0], -1, min(block, last - first))
                q, out = levels_NK[:, first:last].view(shape), out_NK[part, first:last].view(shape)
                s, z = scales[part, group, None], zeros[part, group, None]
                if zero == "min":
                    torch.add(q.mul_(s), z, out=out)
                else:
                    torch.mul(q if zero == "none" else q.sub_(z), s, out=out)
