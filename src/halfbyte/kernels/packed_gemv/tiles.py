"""A tile's way from memory: where its rows lie, their codes and scales into registers, and what four blocks of them add up to.

A product's 16 rows of the weight are not 16 rows of the tile: where SLOTS blocks of x stand side by side in a product, so do SLOTS
blocks of a row, and 16 / SLOTS rows of the tile make a product. So one load of a warp reads whole cache lines (with one row of x
128 bytes of two rows of 4-bit codes, not 32 of eight), and each lane's sums belong to one block, with one scale. Of the eight sums
of a row of a product, those count where the row's block is that of x.

Letters: see `fused.py` and `lanes.py`; q is one of the SLOTS products that make 16 rows, j one of the 4 / SLOTS that make four
blocks, h a half of a product's rows (g and g + 8).
"""

# Kernels are typed by Triton, whose decorator is not.
# Tuples grow in unrolled loops, and Triton knows no `(*tuple, element)`.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.kernels.packed_gemv import ptx
from halfbyte.kernels.packed_gemv.beside import field
from halfbyte.kernels.packed_gemv.lanes import block, decode, of_quad, words

PREFETCH = tl.constexpr(ptx.PREFETCH)
GET = tl.constexpr(ptx.GET)
ASKED = tl.constexpr(ptx.ASKED)


@triton.jit
def segment_of(segments, tile, SEGMENTS: tl.constexpr, PAIRED: tl.constexpr):
    """The segment of a tile (a number or a block of them); the first one's where two are paired."""
    s = tile * 0
    for i in tl.static_range(1, 1 if PAIRED else SEGMENTS):
        s += (tile >= field(segments, i, 10)).to(tl.int32)
    return s


@triton.jit
def fetch(segments, tile, ROW_BYTES: tl.constexpr, SEGMENTS: tl.constexpr, PAIRED: tl.constexpr, RT: tl.constexpr):
    """A tile's codes into the L2 cache."""
    s = segment_of(segments, tile, SEGMENTS, PAIRED)
    tall: tl.constexpr = 16 if PAIRED else 16 * RT
    row = (tile - field(segments, s, 10)) * tall
    for f in tl.static_range(2 if PAIRED else 1):
        sf = f if PAIRED else s
        count = tl.minimum(field(segments, sf, 8) - row, tall).to(tl.int32) * ROW_BYTES
        address = field(segments, sf, 0) + (field(segments, sf, 7) + row) * ROW_BYTES
        tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [address, count], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def lines_of(
    segments, tile, g, t, K64: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr, SEGMENTS: tl.constexpr,
    PAIRED: tl.constexpr, RT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Of a tile: whole tiles that follow in its segment; for each of its RT parts where its scales, nested scales and zero points
    lie, and the offset; a lane's first code; the first block of the first row whose scale it reads; rows from its first one on."""
    s = segment_of(segments, tile, SEGMENTS, PAIRED)
    tall: tl.constexpr = 16 if PAIRED else 16 * RT
    row = (tile - field(segments, s, 10)) * tall
    wide: tl.constexpr = 16 if KIND == "dense" else 8 if KIND == "int8" else 4
    beside, codes, rows, rest = (), (), (), ()
    for f in tl.static_range(RT):
        sf = f if PAIRED else s
        top = (row if PAIRED else row + 16 * f) + g // SLOTS
        mine = field(segments, sf, 7) + top
        codes = codes + (field(segments, sf, 0).to(tl.pointer_type(tl.uint64)) + mine * (K64 * wide) + t * (wide // 4),)
        rows = rows + ((mine.to(tl.int32) + t % SLOTS * (16 // SLOTS)) * K64,)
        rest = rest + ((field(segments, sf, 8) - top).to(tl.int32),)
        where = (field(segments, sf, 1),)
        if NESTED:
            offset = tl.load(field(segments, sf, 3).to(tl.pointer_type(tl.float32)))
            where = where + (field(segments, sf, 2), offset)
        if ZERO != "none":
            where = where + (field(segments, sf, 4),)
        beside = beside + (where,)
    return (field(segments, s, 8) - row).to(tl.int32) // tall - 1, beside, codes, rows, rest


@triton.jit
def next_lines(
    lines, segments, tile, g, t, K64: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr,
    SEGMENTS: tl.constexpr, PAIRED: tl.constexpr, RT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Of the tile after that of `lines`: the same, a fixed way on, unless a segment ends."""
    left, beside, codes, rows, rest = lines
    tall: tl.constexpr = 16 if PAIRED else 16 * RT
    wide: tl.constexpr = 16 if KIND == "dense" else 8 if KIND == "int8" else 4
    if left > 0:
        left -= 1
        further, below, fewer = (), (), ()
        for i in tl.static_range(RT):
            further = further + (codes[i] + tall * K64 * wide,)
            below = below + (rows[i] + tall * K64,)
            fewer = fewer + (rest[i] - tall,)
        codes, rows, rest = further, below, fewer
    else:
        left, beside, codes, rows, rest = lines_of(
            segments, tile, g, t, K64, KIND, NESTED, ZERO, SEGMENTS, PAIRED, RT, SLOTS
        )  # fmt: skip
    return left, beside, codes, rows, rest


@triton.jit
def _at(four, j, g, K64: tl.constexpr, SLOTS: tl.constexpr):
    """The block of lane g of product j of the four, or one that exists: x is zero there."""
    if K64 % 4 == 0:
        return tl.minimum(four, K64 - 4) + (j * SLOTS + g % SLOTS)
    else:
        return tl.minimum(four + j * SLOTS + g % SLOTS, K64 - 1)


@triton.jit
def raw_scales(
    lines, four, g, t, live, K64: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr,
    RT: tl.constexpr, SLOTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What lane t reads of product q = t % SLOTS, j = t / SLOTS: scale, or code, nested scale and offset; zero point."""
    _, beside, _, rows, rest = lines
    raw = ()
    if KIND == "four":
        at = _at(four, t // SLOTS, g, K64, SLOTS)
        for f in tl.static_range(RT):
            for h in tl.static_range(2):
                index = (rows[f] + (at + h * (8 // SLOTS) * K64)) // PER
                here = live
                if RAGGED:
                    here = live & (rest[f] > t % SLOTS * (16 // SLOTS) + h * (8 // SLOTS))
                if NESTED:
                    raw = raw + (tl.load(beside[f][0].to(tl.pointer_type(tl.uint8)) + index, mask=here, other=0),)
                    raw = raw + (tl.load(beside[f][1].to(tl.pointer_type(tl.float32)) + index // 256, mask=here, other=0.0),)
                    raw = raw + (beside[f][2],)
                else:
                    raw = raw + (tl.load(beside[f][0].to(tl.pointer_type(tl.float32)) + index, mask=here, other=0.0),)
                if ZERO != "none":
                    zeros = beside[f][3 if NESTED else 1].to(tl.pointer_type(tl.float32))
                    raw = raw + (tl.load(zeros + index, mask=here, other=0.0),)
    return raw


@triton.jit
def _codes(
    lines, four, f: tl.constexpr, q: tl.constexpr, j: tl.constexpr, g, live,
    K64: tl.constexpr, KIND: tl.constexpr, SLOTS: tl.constexpr, RAGGED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Both halves of product (q, j) of part f."""
    _, _, codes, _, rest = lines
    wide: tl.constexpr = 16 if KIND == "dense" else 8 if KIND == "int8" else 4
    at = codes[f] + _at(four, j, g, K64, SLOTS) * wide
    read = ()
    for h in tl.static_range(2):
        here = live
        if RAGGED:
            here = live & (rest[f] > q * (16 // SLOTS) + h * (8 // SLOTS))
        read = read + (words(at + (q * (16 // SLOTS) + h * (8 // SLOTS)) * (K64 * wide), here, KIND, INTERPRETED),)
    return read


@triton.jit
def first_codes(
    lines, four, g, live, K64: tl.constexpr, KIND: tl.constexpr, RT: tl.constexpr, SLOTS: tl.constexpr, RAGGED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    read = ()
    for f in tl.static_range(RT):
        for q in tl.static_range(SLOTS):
            for j in tl.static_range(4 // SLOTS):
                read = read + _codes(lines, four, f, q, j, g, live, K64, KIND, SLOTS, RAGGED, INTERPRETED)
    return read


@triton.jit
def _own(part, g, SLOTS: tl.constexpr):
    """Of the sums of rows g and g + 8 those of the lane's block. A lane's columns are slots 2t and 2t + 1 modulo SLOTS; where
    neither is its own, what is left belongs to nobody and is put nowhere."""
    if SLOTS == 1:
        return part
    else:
        return tl.where(g % 2 == 1, part[1], part[0]), tl.where(g % 2 == 1, part[3], part[2])


@triton.jit
def _scales(raw, levels_at, nested_levels, NESTED: tl.constexpr, ZERO: tl.constexpr, RT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Scales (and zero points) of both halves of each part, one a lane, as `raw_scales` read them."""
    scales, zeros = (), ()
    per: tl.constexpr = (3 if NESTED else 1) + (0 if ZERO == "none" else 1)
    for i in tl.static_range(2 * RT):
        if NESTED:
            code = raw[per * i].to(tl.int32)
            if INTERPRETED:
                level = tl.load(nested_levels + code)
            else:
                level = tl.inline_asm_elementwise(GET, "=f,r", [levels_at + code * 4], dtype=tl.float32, is_pure=True, pack=1)
            scales = scales + (level * raw[per * i + 1] + raw[per * i + 2],)
        else:
            scales = scales + (raw[per * i],)
        if ZERO != "none":
            zeros = zeros + (raw[per * i + per - 1],)
    return scales, zeros


@triton.jit
def _term(part, s, z, ones, KIND: tl.constexpr, ZERO: tl.constexpr):
    if KIND != "four":
        return part
    elif ZERO == "none":
        return s * part
    elif ZERO == "min":
        return s * part + z * ones
    else:
        return s * (part - z * ones)


@triton.jit
def _added(acc, part, s, z, ones, KIND: tl.constexpr, ZERO: tl.constexpr, SLOTS: tl.constexpr):
    """acc + scale * part of both halves (s and z: of each), and what a zero point adds: `ones` holds the sums of x."""
    if SLOTS == 1:
        more = ()
        for i in tl.static_range(4):
            more = more + (acc[i] + _term(part[i], s[i // 2], z[i // 2], ones[i], KIND, ZERO),)
        return more
    else:
        return acc[0] + _term(part[0], s[0], z[0], ones[0], KIND, ZERO), acc[1] + _term(part[1], s[1], z[1], ones[1], KIND, ZERO)


@triton.jit
def four_blocks(
    acc, read, raw, xs, lines, four, live, g, t, base, levels_at, pairs, nested_levels,
    K64: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, RT: tl.constexpr,
    SLOTS: tl.constexpr, NT: tl.constexpr, WARPS: tl.constexpr, HALF: tl.constexpr, RAGGED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc[NT (SLOTS f + q) + n] + four blocks of a tile; and codes and scales of the next four, `lines` at `four`, codes asked for
    where their place is free."""
    coming = raw_scales(lines, four, g, t, live, K64, KIND, NESTED, PER, ZERO, RT, SLOTS, RAGGED)
    new, sums, scales, zeros, ones = (), (), (), (), ()
    if KIND == "four":
        scales, zeros = _scales(raw, levels_at, nested_levels, NESTED, ZERO, RT, INTERPRETED)
    if ZERO != "none":
        one = (tl.full((WARPS * 32,), 0x3F803F80 if tl.bfloat16 == HALF else 0x3C003C00, tl.uint32),) * 8
        for i in tl.static_range(4 // SLOTS * NT):
            ones = ones + (_own(block(one, one, xs[i], WARPS, HALF, INTERPRETED), g, SLOTS),)
    for f in tl.static_range(RT):
        for q in tl.static_range(SLOTS):
            mine = ()
            for n in tl.static_range(NT):
                mine = mine + (acc[NT * (SLOTS * f + q) + n],)
            for j in tl.static_range(4 // SLOTS):
                g_row = decode(read[2 * ((f * SLOTS + q) * (4 // SLOTS) + j)], base, pairs, KIND, INTERPRETED)
                h_row = decode(read[2 * ((f * SLOTS + q) * (4 // SLOTS) + j) + 1], base, pairs, KIND, INTERPRETED)
                s, z = (), ()
                if KIND == "four":
                    at = tl.full((WARPS * 32,), q + SLOTS * j, tl.int32)
                    s = (of_quad(scales[2 * f], at, WARPS, INTERPRETED), of_quad(scales[2 * f + 1], at, WARPS, INTERPRETED))
                    z = s
                    if ZERO != "none":
                        z = (of_quad(zeros[2 * f], at, WARPS, INTERPRETED), of_quad(zeros[2 * f + 1], at, WARPS, INTERPRETED))
                parts, more = (), ()
                for n in tl.static_range(NT):
                    parts = parts + (_own(block(g_row, h_row, xs[j * NT + n], WARPS, HALF, INTERPRETED), g, SLOTS),)
                new = new + _codes(lines, four, f, q, j, g, live, K64, KIND, SLOTS, RAGGED, INTERPRETED)
                for n in tl.static_range(NT):
                    part = parts[n]
                    if KIND != "four":
                        s, z = part, part
                    sum_x = part
                    if ZERO != "none":
                        sum_x = ones[j * NT + n]
                    more = more + (_added(mine[n], part, s, z, sum_x, KIND, ZERO, SLOTS),)
                mine = more
                if not INTERPRETED and (q * (4 // SLOTS) + j) % 2 == 1:
                    tl.inline_asm_elementwise(ASKED, "=r,r", [t], dtype=tl.int32, is_pure=False, pack=1)
            sums = sums + mine
    return sums, new, coming
