"""Launching the kernels: shapes chosen by hand from measurements, one a class of products."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize.fused import INTERPRETED
from halfbyte.kernels.dequantize.levels import nested_levels
from halfbyte.kernels.packed_gemv import fused, low, ptx
from halfbyte.kernels.packed_gemv.product import Launch, Shape

BITS = {"four": 4, "int8": 8, "dense": 16}
HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
KEPT = {4: 112, 8: 64, 16: 40}
"""Registers a thread that x may stay in, by warps of a program."""
MOST_OUTPUTS = 256
"""Rows of the weight whose sums are joined at a time."""


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether kernels may start before their predecessor ends, and fetch ahead into the L2 cache (sm_90 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def chosen(launch: Launch, rows: int) -> Shape:
    """The shape for a product with `rows` rows of x."""
    if launch.kind == "dense":
        return Shape(1, 8, 2)
    if rows > 2:
        return Shape(2 if launch.paired else 1, 4 if rows > 8 else 8, 2)
    return Shape(2 if launch.paired else 1, 16, 1)


def low_rank(launch: Launch, x: Tensor) -> None:
    """A x of the group into `launch.xa`."""
    rank, rows = launch.a.shape[0], triton.next_power_of_2(x.shape[0])
    early = hopper(x.device)
    options: dict[str, Any] = {} if INTERPRETED else {"num_warps": 8, "launch_pdl": early}
    tall = 2 if rows <= 2 else 1
    low._low_rank[(rank // tall,)](
        x, launch.a, launch.xa, x.shape[0], x.shape[1], x.stride(0), A_ROWS=rank, TALL=tall, ROWS=rows, SPAN=4096 // rows, PDL=early,
        **options,
    )  # fmt: skip


def multiply(
    launch: Launch, activation: str | None, x: Tensor, out: Tensor, add: Tensor | None, multiplier: float, ready: bool,
    shape: Shape | None,
) -> None:  # fmt: skip
    """See the package."""
    rows = x.shape[0]
    shape = shape or chosen(launch, rows)
    tall = 2 if launch.paired else shape.tiles
    assert x.stride(0) % 8 == 0 or rows == 1, "rows of x start at multiples of 16 bytes"
    segments, tiles = launch.segments[tall]
    if launch.rank and not ready:
        low_rank(launch, x)
    programs = min(tiles, multiprocessors(x.device) * shape.programs)
    blocks, steps = x.shape[1] // 64, -(-x.shape[1] // (256 * shape.warps))
    slots = 4 if rows <= 2 else 2 if rows <= 4 else 1
    kept = 1 if rows == 1 else 8 // slots * (2 if rows > 8 else 1)
    batch = _batch(launch.kind, launch.paired, tall, shape.warps, kept, -(-tiles // programs))
    wide = 16 if launch.paired else 16 * tall
    early = hopper(x.device) and shape.early
    options: dict[str, Any] = {"num_warps": shape.warps, "num_stages": 1, "launch_pdl": early}
    if shape.registers is not None:
        options["maxnreg"] = shape.registers
    if INTERPRETED:
        options = {}
    fused._gemv[(programs,)](
        out, x, out if add is None else add, segments, launch.pairs, nested_levels(str(x.device)), launch.xa,
        _scratch() if INTERPRETED else launch.xa, rows, x.stride(0), out.stride(0), out.stride(0) if add is None else add.stride(0),
        float(multiplier), tiles, launch.a.shape[0],
        K64=blocks, KIND=launch.kind, NESTED=launch.nested, PER=launch.per, ZERO=launch.zero, SEGMENTS=launch.count,
        PAIRED=launch.paired, ACT=activation or "none", ADD=add is not None, BIAS=launch.bias, RANK=launch.rank, RT=tall,
        SLOTS=slots, NT=2 if rows > 8 else 1, ROWS=kept, BATCH=batch, OUT=triton.next_power_of_2(batch * wide), WARPS=shape.warps,
        HALF=HALVES[x.dtype], SHARED=ptx.shared(launch.kind, launch.nested, shape.warps * 32), SUMS=ptx.sums_at(launch.kind),
        ROW_BYTES=blocks * 8 * BITS[launch.kind], KEEP=steps * (4 // slots) * (2 if rows > 8 else 1) * 8 <= min(KEPT.get(shape.warps, 64), (shape.registers or 255) // 3),
        PDL=early, AHEAD=shape.ahead if hopper(x.device) else 0, INTERPRETED=INTERPRETED, **options,
    )  # fmt: skip


def _batch(kind: str, paired: bool, tall: int, warps: int, kept: int, most: int) -> int:
    """Tiles whose sums stand in shared memory at a time."""
    room = (ptx.STATIC_BYTES - ptx.sums_at(kind)) // (4 * 16 * tall * warps * kept)
    assert room > 0, f"{warps} warps are too many for {kept} rows of x"
    return min(room, most, MOST_OUTPUTS // (16 if paired else 16 * tall))


@functools.cache
def _scratch() -> Tensor:
    """The interpreter's stand-in for shared memory."""
    return torch.empty(ptx.STATIC_BYTES // 4)
