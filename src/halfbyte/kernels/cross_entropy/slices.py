"""A packed output head in slices of its vocabulary, so that no more than a slice is ever decoded.

Why: decoded whole, the head of an 8B model takes as much memory again as packing it has saved. A slice is a view of the stored
bytes: it starts where a byte, a block and (nested scales) a block of scales start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from halfbyte.formats.packed import NESTED_BLOCK, Packed

SLICE_BYTES = 1 << 27
"""Of decoded 16-bit weights at a time."""


def slices(packed: Packed, slice_bytes: int = 0) -> Iterator[tuple[slice, Packed]]:
    """Rows of the weight `[V, H]`, and those as a packed weight of their own; int8, nf4, fp4. slice_bytes: 0 is `SLICE_BYTES`."""
    fmt, (rows, width) = packed.format, packed.shape
    assert fmt.kind in ("int8", "nf4", "fp4"), fmt
    unit = 1 if fmt.kind == "int8" else fmt.block * (NESTED_BLOCK if fmt.nested else 1)
    unit = unit // math.gcd(unit, width)
    step = max((slice_bytes or SLICE_BYTES) // (2 * width) // unit, 1) * unit
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), _part(packed, start, stop)


def _part(packed: Packed, start: int, stop: int) -> Packed:
    fmt, width = packed.format, packed.shape[1]
    codes, scales, nested_scales, nested_offset, zeros = packed.tensors()
    if fmt.kind == "int8":
        codes, scales = codes.view(-1)[start * width : stop * width], scales.view(-1)[4 * start : 4 * stop]
    else:
        first, last = start * width, stop * width
        codes = codes.view(-1)[first // 2 : -(-last // 2)]
        blocks = slice(first // fmt.block, -(-last // fmt.block))
        if fmt.nested:
            scales = scales.view(-1)[blocks]
            outer = slice(4 * (blocks.start // NESTED_BLOCK), 4 * -(-blocks.stop // NESTED_BLOCK))
            nested_scales = nested_scales.view(-1)[outer]
        else:
            scales = scales.view(-1)[4 * blocks.start : 4 * blocks.stop]
    return Packed(fmt, (stop - start, width), packed.dtype, codes, scales, nested_scales, nested_offset, zeros)
