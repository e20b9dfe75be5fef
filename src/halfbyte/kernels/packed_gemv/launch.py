"""Launching the kernel: shapes chosen by hand from measurements, one a class of products.

A program is 16 rows of the weight (32 where gate and up go together), all columns, its warps side by side along them: small enough
that a matrix of 4,096 rows feeds every multiprocessor, and no sums cross programs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize.fused import INTERPRETED
from halfbyte.kernels.dequantize.levels import nested_levels
from halfbyte.kernels.packed_gemv import fused, ptx
from halfbyte.kernels.packed_gemv.product import Launch, Shape

BITS = {"four": 4, "int8": 8, "dense": 16}
HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether kernels may start before their predecessor ends, and fetch ahead into the L2 cache (sm_90 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def chosen(launch: Launch, rows: int) -> Shape:
    """The shape for a product with `rows` rows of x."""
    if launch.kind == "dense":
        return Shape(1, 4)
    return Shape(2 if launch.paired else 1, 8)


def multiply(
    launch: Launch, activation: str | None, x: Tensor, out: Tensor, add: Tensor | None, multiplier: float, shape: Shape | None
) -> None:
    """See the package."""
    shape = shape or chosen(launch, x.shape[0])
    tiles = 2 if launch.paired else shape.tiles
    segments, programs = launch.segments[tiles]
    a_programs = launch.count * launch.rank // 16 * launch.slices
    early, fetch = hopper(x.device) and shape.early, hopper(x.device) and shape.fetch
    options: dict[str, Any] = {"num_warps": shape.warps, "num_stages": 1, "launch_pdl": early}
    if shape.registers is not None:
        options["maxnreg"] = shape.registers
    if INTERPRETED:
        options = {}
    assert x.stride(0) % 8 == 0 or x.shape[0] == 1, "rows of x start at multiples of 16 bytes"
    fused._gemv[(a_programs + programs,)](
        out, x, out if add is None else add, segments, launch.pairs, nested_levels(str(x.device)), launch.a, launch.xa,
        launch.counters, x.shape[0], x.shape[1] // 64, x.stride(0), out.stride(0), out.stride(0) if add is None else add.stride(0),
        float(multiplier), launch.a.shape[0], a_programs,
        COLUMNS=x.shape[1], KIND=launch.kind, NESTED=launch.nested, PER=launch.per, ZERO=launch.zero, SEGMENTS=launch.count,
        PAIRED=launch.paired, ACT=activation or "none", ADD=add is not None, RANK=launch.rank, SLICES=launch.slices, RT=tiles,
        NT=1 if x.shape[0] <= 8 else 2, WARPS=shape.warps, HALF=HALVES[x.dtype], TABLE=ptx.table(shape.warps * 32),
        BITS=BITS[launch.kind], PDL=early, PREFETCHED=fetch, INTERPRETED=INTERPRETED, **options,
    )  # fmt: skip
