"""Four-bit codes decoded a 32-bit word (8 weights) a thread at a time: the tile that the fast Triton kernels share.

What bounds a decode is the copy: a weight must cost an SM a few instructions, and its bytes must move 16 at a time.

- A thread reads one word, so that what it writes (8 neighbours, 16 bytes in 16 bits) is one store, and a warp's stores join.
- The 16 levels live in the lanes of a warp (lane i holds level i mod 16); `shfl` fetches them: a shift and a shuffle a weight, no
  address, no memory. The shuffle reads only the low bits of its index, so codes are never masked.
- The scale is read, and if nested decoded, once a word.

Compiled for sm_90, 64 weights cost a thread 530 instructions, 32 with all else; tables in memory cost 720.
Every value is one fp32 product (int4 with zeros: a sum too) and one rounding, never contracted (`enable_fp_fusion=False`): the bits
of `formats.dequantize`.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.formats.packed import NESTED_BLOCK, Format
from halfbyte.kernels.dequantize.levels import levels

INTERPRETED = triton.knobs.runtime.interpret

SHIFTS = (4, 0, 12, 8, 20, 16, 28, 24)
"""Where the codes of a word's 8 weights start: two a byte, the first in the high nibble."""


def _assembly(pack: int) -> tuple[str, str]:
    """PTX of `_lookup` for `pack` words at once, which share one fetch of the lane's level, and its constraints.

    Out: 8 times `pack` levels. In: `pack` words, and `pack` times the table's address.
    """
    word, address = 8 * pack, 9 * pack
    lines = ["{ .reg .b32 lane, level, code; .reg .b64 at;", "mov.u32 lane, %laneid;", "and.b32 lane, lane, 15;"]
    lines += [f"mad.wide.u32 at, lane, 4, ${address};", "ld.global.nc.b32 level, [at];"]
    for weight, shift in enumerate(SHIFTS):
        for i in range(pack):
            lines.append(f"shr.u32 code, ${word + i}, {shift};")
            # 0x101f: each half of the warp looks up among its own 16 lanes.
            lines.append(f"shfl.sync.idx.b32 ${weight * pack + i}, level, code, 0x101f, 0xffffffff;")
    return "\n".join([*lines, "}"]), ",".join(["=&f"] * 8 * pack + ["r"] * pack + ["l"] * pack)


_ASSEMBLY_2, _CONSTRAINTS_2 = (tl.constexpr(text) for text in _assembly(2))
_ASSEMBLY_4, _CONSTRAINTS_4 = (tl.constexpr(text) for text in _assembly(4))
_NESTED_BLOCK = tl.constexpr(NESTED_BLOCK)


@triton.jit
def to_dtype(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 rounded to nearest, ties to even. Triton's interpreter truncates to bf16 (3.6), so there it is done on the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _lookup(words, table, LOOKUP: tl.constexpr):
    """The fp32 levels of the 8 codes of each word. LOOKUP: shuffle2, shuffle4 (words a thread has, or a divisor of it; compiled for
    NVIDIA only) or load."""
    if LOOKUP == "shuffle4":
        return tl.inline_asm_elementwise(
            _ASSEMBLY_4, _CONSTRAINTS_4, [words, table.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=4,
        )  # fmt: skip
    elif LOOKUP == "shuffle2":
        return tl.inline_asm_elementwise(
            _ASSEMBLY_2, _CONSTRAINTS_2, [words, table.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (
            tl.load(table + ((words >> 4) & 15)), tl.load(table + (words & 15)),
            tl.load(table + ((words >> 12) & 15)), tl.load(table + ((words >> 8) & 15)),
            tl.load(table + ((words >> 20) & 15)), tl.load(table + ((words >> 16) & 15)),
            tl.load(table + ((words >> 28) & 15)), tl.load(table + ((words >> 24) & 15)),
        )  # fmt: skip


@triton.jit
def _weight(level, s, z, ZERO: tl.constexpr):
    if ZERO == "none":
        return level * s
    elif ZERO == "min":
        return level * s + z
    else:
        return (level - z) * s


@triton.jit
def decode_tile(
    out, codes, scales, nested_scales, nested_offset, zeros, table, nested_levels,
    first, K, stride, rows, columns,
    ZERO: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, LOOKUP: tl.constexpr, POLICY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] into `out`, its top left element; `first`: that one's place in the flat weight, int64.

    rows, columns: of the tile that exist (EVEN: all columns do). K and stride are multiples of 8; codes are aligned to 4 bytes, and
    must not be known to be aligned better: Triton would then read several words a thread, and deal them out through shared memory.
    """
    # `// 8 * 8` says so to the compiler, which then stores 16 bytes at a time; `tl.multiple_of` has no effect on an argument.
    stride, columns = stride // 8 * 8, columns // 8 * 8
    # One flat index, so that one thread's word is the same in every layout that Triton may choose.
    i = tl.arange(0, ROWS * COLUMNS // 8)
    row, column = i // (COLUMNS // 8), i % (COLUMNS // 8)
    alive = row < rows
    if not EVEN:
        alive = alive & (column * 8 < columns)
    at = row * (K // 8) + column
    words = tl.load(codes + first // 8 + at, mask=alive, other=0, eviction_policy="evict_first")

    # Unsigned, since a signed division by a power of two is no plain shift.
    first_block = first.to(tl.uint64) // BLOCK
    block = ((at * 8).to(tl.uint32) + (first.to(tl.uint64) % BLOCK).to(tl.uint32)) // BLOCK
    if NESTED:
        within = (first_block % _NESTED_BLOCK).to(tl.uint32) + block
        outer = tl.load(
            nested_scales + first_block // _NESTED_BLOCK + (within // _NESTED_BLOCK).to(tl.int32), mask=alive, other=0.0
        )
    block = block.to(tl.int32)
    if NESTED:
        code = tl.load(scales + first_block + block, mask=alive, other=0).to(tl.int32)
        s = tl.load(nested_levels + code) * outer + tl.load(nested_offset)
    else:
        s = tl.load(scales + first_block + block, mask=alive, other=0.0)
    z = s
    if ZERO != "none":
        z = tl.load(zeros + first_block + block, mask=alive, other=0.0)

    a, b, c, d, e, f, g, h = _lookup(words, table, LOOKUP)
    even = tl.join(tl.join(_weight(a, s, z, ZERO), _weight(e, s, z, ZERO)), tl.join(_weight(c, s, z, ZERO), _weight(g, s, z, ZERO)))
    odd = tl.join(tl.join(_weight(b, s, z, ZERO), _weight(f, s, z, ZERO)), tl.join(_weight(d, s, z, ZERO), _weight(h, s, z, ZERO)))
    weights = tl.reshape(tl.join(even, odd), [ROWS * COLUMNS])

    element = tl.arange(0, ROWS * COLUMNS)
    row, column = element // COLUMNS, element % COLUMNS
    alive = row < rows
    if not EVEN:
        alive = alive & (column < columns)
    target = out + (row * stride + column)
    tl.store(target, to_dtype(weights, out.dtype.element_ty, INTERPRETED), mask=alive, eviction_policy=POLICY)


class Tiling(NamedTuple):
    """How a launch is cut up."""

    lookup: str = "load" if INTERPRETED or torch.version.hip else "shuffle4"
    weights: int = 4096
    """Weights of a tile."""
    warps: int = 4
    columns: int = 2048
    """At most so many neighbours of a row in a tile."""
    policy: str = ""
    """Of the stores, towards the L2: "", evict_first or evict_last."""
    dependent: bool = True
    """Launched before the kernel ahead has ended (programmatic dependent launch, sm_90), and waiting for that in the kernel."""


_NESTED = Tiling()
_PLAIN = Tiling(weights=2048, lookup="load" if _NESTED.lookup == "load" else "shuffle2")


@functools.cache
def tiling_of(fmt: Format | None, device: str) -> Tiling:
    """What measured fastest on an H200 (bench/decode_gpu.py): a nested scale is decoded once a word, so its threads take two."""
    chosen = _NESTED if fmt is None or fmt.nested else _PLAIN
    early = torch.device(device).type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)
    return chosen if early else chosen._replace(dependent=False)


@functools.cache
def table(fmt: Format, device: str) -> Tensor:
    """fp32 `[16]`: what the codes of a four-bit format stand for before scale and zero."""
    if fmt.kind == "int4":
        return torch.arange(16, dtype=torch.float32, device=device) - (8 if fmt.zero == "none" else 0)
    return levels(fmt.kind, device)


def suits(fmt: Format, width: int) -> bool:
    """Whether rows of `width` weights can be decoded in words: a word must lie in one row and in one block."""
    whole = fmt.kind in ("nf4", "fp4") or (fmt.kind == "int4" and width % fmt.block == 0)
    return whole and width % 8 == 0 and fmt.block % 8 == 0


def columns_of_tile(width: int, most: int) -> int:
    """The largest power of two up to `most` that wastes no more than a sixteenth of the lanes on a row's end; at least 256."""
    columns = most
    while columns > 256 and -(-width // columns) * columns > width * 17 // 16:
        columns //= 2
    return columns
