"""The CPU twin: a table of 256 bytes x 2 levels, then the block's scale. Bit-equal to the reference.

Why: a byte holds two codes, so one look-up yields two levels. The pair of fp32 levels is moved as ONE 8-byte element, which
torch gathers four times as fast as two 4-byte ones. Work goes through chunks, so that the fp32 scratch is bounded.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Packed
from halfbyte.kernels.dequantize import reference
from halfbyte.kernels.dequantize.levels import levels

CHUNK = 1 << 20
"""Weights decoded at a time: bounds the fp32 scratch to 4 MiB; smaller chunks measured slower (0.37 ms at 2^17, 0.28 at 2^20)."""


@functools.cache
def _pairs(kind: str) -> Tensor:
    """float64 `[256]`: entry b holds the bits of two fp32, the levels of the high and the low nibble of byte b."""
    byte = torch.arange(256)
    table = levels(kind)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).contiguous().view(torch.float64).view(-1)


def _expand(codes: Tensor, kind: str) -> Tensor:
    """Bytes `[m]` to the fp32 levels `[2m]` of their nibbles."""
    return _pairs(kind).index_select(0, codes.to(torch.int32)).view(torch.float32)


def decode(packed: Packed, out: Tensor) -> None:
    """Writes the weight into `out` (contiguous, n elements, any float dtype)."""
    if packed.format.kind in ("nf4", "fp4"):
        _codebook(packed, out.view(-1))
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
    rest = packed.numel - whole * block
    if rest:
        tail = _expand(packed.codes[whole * block // 2 :], kind)[:rest]
        out_n[whole * block :] = tail * scales[whole]
