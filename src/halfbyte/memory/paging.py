"""The bytes of AdamW's moments: on the device, or in host memory with two chunks of them on the device. Exact."""

from __future__ import annotations

from halfbyte.kernels.adamw import CHUNK, SLOTS, layout
from halfbyte.memory.part import Part


def size(numbers: int, bits: int) -> int:
    """Bytes of both moments of so many numbers, a multiple of 256."""
    return sum(n * dtype.itemsize for n, dtype in layout(numbers, bits))


def moments(numbers: int, bits: int, paged: bool) -> Part:
    """numbers: in the flat buffer, padding included."""
    named = "AdamW's two moments in 8 bits" if bits == 8 else "AdamW's two moments in fp32"
    whole = size(numbers, bits)
    if not paged:
        return Part("optimizer", whole, named)
    return Part(
        "optimizer", SLOTS * size(min(CHUNK, numbers), bits), f"{named}: {SLOTS} chunks, the rest in host memory", host=whole
    )
