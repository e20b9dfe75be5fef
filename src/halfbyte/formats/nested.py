"""Nested scales: the scales of a codebook format, themselves in 8 bits (the QLoRA paper's double quantisation).

    offset = mean of the scales;  scale - offset in the signed dynamic map, blocks of 256;  decoded = level * scale2 + offset

Why: 64 weights share a scale, so fp32 scales cost half a bit a weight; nested 0.127. Loss: 0.16 % of a scale on average
for normal weights, up to some per cent in a block of 256 with one huge scale. Scales near 0 may come back slightly negative.

The offset is the fp64 mean, rounded once, so that it does not depend on the number of threads; it is within 1 ulp or so of
what bitsandbytes stores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats.dynamic8 import dequantize_blockwise, quantize_blockwise
from halfbyte.formats.packed import NESTED_BLOCK


def encode(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales fp32 `[blocks]` to codes uint8 `[blocks]`, their scales fp32 `[ceil(blocks/256)]`, offset fp32 `[1]`."""
    offset = scales.sum(dtype=torch.float64).div(max(scales.numel(), 1)).to(torch.float32).reshape(1)
    codes, outer = quantize_blockwise(scales - offset, NESTED_BLOCK)
    return codes, outer, offset


def decode(codes: Tensor, outer: Tensor, offset: Tensor) -> Tensor:
    """The inverse: fp32 `[blocks]`, two roundings (product, sum)."""
    return dequantize_blockwise(codes, outer, NESTED_BLOCK).add_(offset)
