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
from halfbyte.kernels.packed_gemv.product import FED_ROWS, MOST_FED, Launch, Pieces, Product, RmsNorm, Shape, cut

BITS = {"four": 4, "int8": 8, "dense": 16}
HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
KEPT = {4: 112, 8: 64, 16: 40}
"""Registers a thread that x may stay in, by warps of a program."""
MOST_OUTPUTS = 256
"""Outputs (rows of the weight, for each row of x) whose sums are joined at a time."""


MANY = (4, 2, None)
"""Of a product with more than 8 rows of x: warps, programs a multiprocessor, registers."""


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether kernels may start before their predecessor ends, and fetch ahead into the L2 cache (sm_90 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def chosen(launch: Launch, rows: int) -> Shape:
    """The shape for a product with `rows` rows of x."""
    tiles = 2 if launch.paired else 1
    if rows > 8:
        return Shape(tiles, *MANY)
    return Shape(tiles, 8, 1) if rows > 2 else Shape(tiles, 16, 1)


def programs(launch: Launch, rows: int, shape: Shape | None = None) -> int:
    """Programs of a launch with `rows` rows of x."""
    shape = shape or chosen(launch, rows)
    return min(launch.segments[2 if launch.paired else shape.tiles][1], multiprocessors(launch.a.device) * shape.programs)


def keeps(width: int, rows: int, shape: Shape) -> bool:
    """Whether a thread holds its part of x in registers."""
    steps = -(-width // (256 * shape.warps))
    return steps * (4 // slots(rows)) * (2 if rows > 8 else 1) * 8 <= min(KEPT.get(shape.warps, 64), (shape.registers or 255) // 3)


def slots(rows: int) -> int:
    """Blocks of 64 columns that share a product: what eight columns of x leave room for."""
    return 4 if rows <= 2 else 2 if rows <= 4 else 1


def kept(rows: int) -> int:
    """Rows of x whose sums are kept."""
    return 1 if rows == 1 else 8 // slots(rows) * (2 if rows > 8 else 1)


def low_rank(launch: Launch, x: Tensor) -> None:
    """A x of the group into `launch.xa`."""
    rank, width, early = launch.a.shape[0], x.shape[1], hopper(x.device)
    options: dict[str, Any] = {} if INTERPRETED else {"num_warps": 4, "launch_pdl": early}
    span, cuts = cut(width)
    low._low_rank[(rank // 16, cuts)](
        x, launch.a, launch.xa, launch.parts, launch.counters, x.shape[0], width, x.stride(0),
        A_ROWS=rank, SPAN=span, CUTS=cuts, WIDE=triton.next_power_of_2(cuts), PDL=early, INTERPRETED=INTERPRETED, **options,
    )  # fmt: skip


def multiply(
    product: Product, launch: Launch, x: Tensor, out: Tensor, add: Tensor | None, multiplier: float, norm: RmsNorm | None,
    pieces: Pieces | None, feeds: Pieces | None, shape: Shape | None,
) -> None:  # fmt: skip
    """See the package."""
    rows = x.shape[0]
    shape = shape or chosen(launch, rows)
    tall = 2 if launch.paired else shape.tiles
    assert x.stride(0) % 8 == 0 or rows == 1, "rows of x start at multiples of 16 bytes"
    assert (norm is None and pieces is None and feeds is None) or rows <= FED_ROWS, f"{rows} rows are not fused"
    assert norm is None or keeps(x.shape[1], rows, shape), "x is too wide for a norm in the product"
    assert norm is None or pieces is not None or not launch.rank, "A x of a normed x comes in pieces"
    segments, tiles, ragged = launch.segments[tall]
    if launch.rank and pieces is None:
        low_rank(launch, x)
    count, blocks, threads = programs(launch, rows, shape), x.shape[1] // 64, shape.warps * 32
    assert feeds is None or count == len(feeds.sums), "made for another number of programs"
    wide = triton.next_power_of_2(launch.a.shape[0])
    groups = 0 if pieces is None else max(min(threads, MOST_FED) // wide, 1)
    assert pieces is None or wide <= threads, f"{wide} ranks are too many for {threads} threads"
    batch = batched(launch.kind, launch.paired, tall, shape.warps, kept(rows), -(-tiles // count), groups * wide)
    assert batch == 1 or kept(rows) < 16, "of 16 rows a batch is one tile"
    early = hopper(x.device) and shape.early
    options: dict[str, Any] = {"num_warps": shape.warps, "num_stages": 1, "launch_pdl": early}
    if shape.registers is not None:
        options["maxnreg"] = shape.registers
    if INTERPRETED:
        options = {}
    fused._gemv[(count,)](
        out, x, out if add is None else add, segments, launch.pairs, nested_levels(str(x.device)),
        launch.xa if pieces is None else pieces.sums, x if norm is None else norm.weight, x if feeds is None else feeds.at,
        launch.xa if feeds is None else feeds.sums, _scratch() if INTERPRETED else launch.xa,
        rows, x.stride(0), out.stride(0), out.stride(0) if add is None else add.stride(0), float(multiplier), tiles,
        0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset,
        K64=blocks, KIND=launch.kind, NESTED=launch.nested, PER=launch.per, ZERO=launch.zero, SEGMENTS=launch.count,
        PAIRED=launch.paired, ACT=product.activation or "none", ADD=add is not None, BIAS=launch.bias, RANK=launch.rank, RT=tall,
        SLOTS=slots(rows), NT=2 if rows > 8 else 1, ROWS=kept(rows), BATCH=batch,
        OUT=triton.next_power_of_2(batch * (16 if launch.paired else 16 * tall)), WARPS=shape.warps, HALF=HALVES[x.dtype],
        SHARED=ptx.shared(launch.kind, launch.nested, threads), SUMS=ptx.sums_at(launch.kind),
        XA=batch * 16 * tall * shape.warps * kept(rows), ROW_BYTES=blocks * 8 * BITS[launch.kind],
        KEEP=keeps(x.shape[1], rows, shape), A_ROWS=launch.a.shape[0],
        PIECES=1 if pieces is None else len(pieces.sums), GROUPS=groups, WIDE=wide, NORM=norm is not None,
        FEED=0 if feeds is None else feeds.at.shape[1],
        PDL=early, AHEAD=shape.ahead if hopper(x.device) else 0, RAGGED=ragged, INTERPRETED=INTERPRETED, **options,
    )  # fmt: skip


def batched(kind: str, paired: bool, tall: int, warps: int, rows: int, most: int, beside: int) -> int:
    """Tiles whose sums stand in shared memory at a time, `beside` numbers of each row of A x next to them. rows: as `kept`."""
    room = (ptx.STATIC_BYTES - ptx.sums_at(kind)) // 4 - beside * rows
    batch = min(room // (16 * tall * warps * rows), MOST_OUTPUTS // rows // (16 if paired else 16 * tall) or 1)
    assert batch > 0, f"{warps} warps are too many for {rows} rows of x"
    return -(-most // -(-most // batch))


@functools.cache
def _scratch() -> Tensor:
    """The interpreter's stand-in for shared memory."""
    return torch.empty(ptx.STATIC_BYTES // 4)
