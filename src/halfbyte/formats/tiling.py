"""Walking a tensor in tiles: what bounds the temporaries of quantising and decoding, whatever the tensor's size.

Why: a weight is quantised on arrival, when memory is shortest, and fused experts pass 2^31 elements; a tile holds at most
`CHUNK` elements (plus what completes a block), so temporaries stay at a few MB on a CPU. Offsets are Python
integers, hence never 32 bits. Cost: a few microseconds a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK = 1 << 18
"""Elements a tile holds on a CPU: 1 MiB in fp32, so that the dozen passes over it stay in cache (2^17 to 2^19 are fastest)."""
ACCELERATOR_CHUNK = 1 << 25
"""Elements a tile holds elsewhere: enough to fill the device."""


def flat_tiles(n: int, unit: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `range(n)`; each starts at a multiple of `unit` and, but for the last, ends at one."""
    chunk = CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
    step = max(chunk // unit, 1) * unit
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def matrix_tiles(rows: int, columns: int, unit: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Row and column slices that cover `[rows, columns]`; only a row longer than a tile is cut, at multiples of `unit`."""
    chunk = CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
    height = max(chunk // max(columns, 1), 1)
    for top in range(0, rows, height):
        for span in flat_tiles(columns, unit, device):
            yield slice(top, min(top + height, rows)), span
