"""The Triton twin: every weight is read once, decoded through shared memory, and multiplied on the tensor cores for up to 16 rows
of x.

Why so: at the rate at which an H200 reads 4-bit weights, a multiprocessor has fewer than five instructions a weight. A byte holds
two codes and one look-up yields both levels as a register of two 16-bit numbers, which is what a tensor core's operand is: about
two instructions a weight in all, for one row of x or for eight. A product takes eight rows of x; with one or two, the columns of x
that would be empty hold other blocks of 64 of the same row (SLOTS of them), so that x stays in few registers and a block's scale is
multiplied once.

As many programs as fit run at once and each walks over its tiles of rows: shared memory is filled once, and a tile's codes are
asked for while the one before is multiplied, so that memory never waits. Warps stand side by side along the columns and never wait
for each other inside a batch of tiles: their sums meet in shared memory, once a batch (`beside.py`). Weights do not depend on the
launch before, so they are asked for before that one has ended.

Letters: N rows of the weight, K columns, M rows of x; a tile is RT times 16 rows (16 of gate and of up); see also `lanes.py`.
"""

# Kernels are typed by Triton, whose decorator is not.
# Tuples grow in unrolled loops, and Triton knows no `(*tuple, element)`.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from halfbyte.kernels.dequantize.fused import to_dtype
from halfbyte.kernels.packed_gemv import ptx
from halfbyte.kernels.packed_gemv.beside import (
    fed_by,
    field,
    finished,
    keep_fed,
    of_pieces,
    put_pieces,
    put_sums,
    row_scaled,
    side_of,
    whole,
)  # fmt: skip
from halfbyte.kernels.packed_gemv.lanes import block, decode, normed, of_quad, words, x_of_four

PREFETCH = tl.constexpr(ptx.PREFETCH)
GET = tl.constexpr(ptx.GET)
TABLE_BYTES = tl.constexpr(ptx.TABLE_BYTES)


@triton.jit
def _segment(segments, tile, SEGMENTS: tl.constexpr, PAIRED: tl.constexpr):
    """The segment of a tile (a number or a block of them); the first one's where two are paired."""
    s = tile * 0
    for i in tl.static_range(1, 1 if PAIRED else SEGMENTS):
        s += (tile >= field(segments, i, 10)).to(tl.int32)
    return s


@triton.jit
def _fetch(segments, tile, ROW_BYTES: tl.constexpr, SEGMENTS: tl.constexpr, PAIRED: tl.constexpr, RT: tl.constexpr):
    """A tile's codes into the L2 cache."""
    s = _segment(segments, tile, SEGMENTS, PAIRED)
    tall: tl.constexpr = 16 if PAIRED else 16 * RT
    row = (tile - field(segments, s, 10)) * tall
    for f in tl.static_range(2 if PAIRED else 1):
        sf = f if PAIRED else s
        count = tl.minimum(field(segments, sf, 8) - row, tall).to(tl.int32) * ROW_BYTES
        address = field(segments, sf, 0) + (field(segments, sf, 7) + row) * ROW_BYTES
        tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [address, count], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _lines(
    segments, tile, g, t, K64: tl.constexpr, KIND: tl.constexpr, SEGMENTS: tl.constexpr, PAIRED: tl.constexpr, RT: tl.constexpr
):
    """Of a tile: whole tiles that follow in its segment; for each of its RT parts the segment; for rows g and g + 8 of each their
    first code and their first block. Rows beyond the last are the last."""
    s = _segment(segments, tile, SEGMENTS, PAIRED)
    tall: tl.constexpr = 16 if PAIRED else 16 * RT
    row = (tile - field(segments, s, 10)) * tall
    wide: tl.constexpr = 16 if KIND == "dense" else 8 if KIND == "int8" else 4
    numbers, codes, rows = (), (), ()
    for f in tl.static_range(RT):
        sf = f if PAIRED else s
        last = field(segments, sf, 8) - 1
        p = field(segments, sf, 0).to(tl.pointer_type(tl.uint64))
        for h in tl.static_range(2):
            mine = field(segments, sf, 7) + tl.minimum((row if PAIRED else row + 16 * f) + g + 8 * h, last)
            codes = codes + (p + mine * (K64 * wide) + t * (wide // 4),)
            rows = rows + (mine.to(tl.int32) * K64,)
        numbers = numbers + (sf,)
    return ((field(segments, s, 8) - row).to(tl.int32) // tall - 1, numbers, codes, rows)


@triton.jit
def _next_lines(
    lines, segments, tile, g, t, K64: tl.constexpr, KIND: tl.constexpr, SEGMENTS: tl.constexpr, PAIRED: tl.constexpr,
    RT: tl.constexpr,
):  # fmt: skip
    """Of the tile after that of `lines`: the same, a fixed way on, unless a segment ends."""
    left, numbers, codes, rows = lines
    tall: tl.constexpr = 16 if PAIRED else 16 * RT
    wide: tl.constexpr = 16 if KIND == "dense" else 8 if KIND == "int8" else 4
    if left > 0:
        left -= 1
        further, below = (), ()
        for i in tl.static_range(2 * RT):
            further = further + (codes[i] + tall * K64 * wide,)
            below = below + (rows[i] + tall * K64,)
        codes, rows = further, below
    else:
        left, numbers, codes, rows = _lines(segments, tile, g, t, K64, KIND, SEGMENTS, PAIRED, RT)
    return left, numbers, codes, rows


@triton.jit
def _at(four, b, K64: tl.constexpr):
    """Block `four + b`, or one that exists: x is zero there."""
    if K64 % 4 == 0:
        return tl.minimum(four, K64 - 4) + b
    else:
        return tl.minimum(four + b, K64 - 1)


@triton.jit
def _raw_scales(
    segments, lines, four, t, live,
    K64: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """What lane t reads for block `four + t` of its rows: scale, or code, nested scale and offset; zero point."""
    _, numbers, _, rows = lines
    raw = ()
    if KIND == "four":
        for i in tl.static_range(2 * RT):
            s = numbers[i // 2]
            index = (rows[i] + _at(four, t, K64)) // PER
            if NESTED:
                raw = raw + (tl.load(field(segments, s, 1).to(tl.pointer_type(tl.uint8)) + index, mask=live, other=0),)
                raw = raw + (tl.load(field(segments, s, 2).to(tl.pointer_type(tl.float32)) + index // 256, mask=live, other=0.0),)
                raw = raw + (tl.load(field(segments, s, 3).to(tl.pointer_type(tl.float32))),)
            else:
                raw = raw + (tl.load(field(segments, s, 1).to(tl.pointer_type(tl.float32)) + index, mask=live, other=0.0),)
            if ZERO != "none":
                raw = raw + (tl.load(field(segments, s, 4).to(tl.pointer_type(tl.float32)) + index, mask=live, other=0.0),)
    return raw


@triton.jit
def _codes(lines, four, b, live, K64: tl.constexpr, KIND: tl.constexpr, RT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Block `four + b` of all rows of a tile."""
    _, _, codes, _ = lines
    wide: tl.constexpr = 16 if KIND == "dense" else 8 if KIND == "int8" else 4
    read = ()
    for i in tl.static_range(2 * RT):
        read = read + (words(codes[i] + _at(four, b, K64) * wide, live, KIND, INTERPRETED),)
    return read


@triton.jit
def _first_codes(lines, four, live, K64: tl.constexpr, KIND: tl.constexpr, RT: tl.constexpr, INTERPRETED: tl.constexpr):
    read = ()
    for b in tl.static_range(4):
        read = read + _codes(lines, four, b, live, K64, KIND, RT, INTERPRETED)
    return read


@triton.jit
def _picked(so_far, part, t, slot: tl.constexpr, SLOTS: tl.constexpr):
    """The columns of x's slot `slot` from `part`, the others as they were. A lane's columns: slots 2t and 2t + 1 modulo SLOTS."""
    if slot == 0:
        return part
    elif slot == 1:
        return so_far[0], part[1], so_far[2], part[3]
    elif slot == 2:
        return tl.where(t % 2 == 1, part[0], so_far[0]), so_far[1], tl.where(t % 2 == 1, part[2], so_far[2]), so_far[3]
    else:
        return so_far[0], tl.where(t % 2 == 1, part[1], so_far[1]), so_far[2], tl.where(t % 2 == 1, part[3], so_far[3])


@triton.jit
def _scales(raw, levels_at, nested_levels, NESTED: tl.constexpr, ZERO: tl.constexpr, RT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Scales (and zero points) of rows g and g + 8 of each part, one a lane: for block `four + t`."""
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
def _spread(values, f: tl.constexpr, j: tl.constexpr, t, SLOTS: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Of rows g and g + 8 of part f, the values of the two slots that a lane's sums belong to."""
    low, high = 2 * t % SLOTS + j * SLOTS, (2 * t + 1) % SLOTS + j * SLOTS
    return (of_quad(values[2 * f], low, WARPS, INTERPRETED), of_quad(values[2 * f], high, WARPS, INTERPRETED),
            of_quad(values[2 * f + 1], low, WARPS, INTERPRETED), of_quad(values[2 * f + 1], high, WARPS, INTERPRETED))  # fmt: skip


@triton.jit
def _added(acc, part, s, z, ones, KIND: tl.constexpr, ZERO: tl.constexpr):
    """acc + scale * part, and what a zero point adds: `ones` holds the sums of x."""
    if KIND != "four":
        return acc[0] + part[0], acc[1] + part[1], acc[2] + part[2], acc[3] + part[3]
    elif ZERO == "none":
        return acc[0] + s[0] * part[0], acc[1] + s[1] * part[1], acc[2] + s[2] * part[2], acc[3] + s[3] * part[3]
    elif ZERO == "min":
        return (acc[0] + s[0] * part[0] + z[0] * ones[0], acc[1] + s[1] * part[1] + z[1] * ones[1],
                acc[2] + s[2] * part[2] + z[2] * ones[2], acc[3] + s[3] * part[3] + z[3] * ones[3])  # fmt: skip
    else:
        return (acc[0] + s[0] * (part[0] - z[0] * ones[0]), acc[1] + s[1] * (part[1] - z[1] * ones[1]),
                acc[2] + s[2] * (part[2] - z[2] * ones[2]), acc[3] + s[3] * (part[3] - z[3] * ones[3]))  # fmt: skip


@triton.jit
def _four_blocks(
    acc, read, raw, xs, segments, lines, four, live, t, base, levels_at, pairs, nested_levels,
    K64: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, RT: tl.constexpr,
    SLOTS: tl.constexpr, NT: tl.constexpr, WARPS: tl.constexpr, HALF: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc[NT f + n] + four blocks of a tile; and codes and scales of the next four, `lines` at `four`, codes asked for where their
    place is free."""
    coming = _raw_scales(segments, lines, four, t, live, K64, KIND, NESTED, PER, ZERO, RT)
    new, picked, scales, zeros = (), (), (), ()
    if KIND == "four":
        scales, zeros = _scales(raw, levels_at, nested_levels, NESTED, ZERO, RT, INTERPRETED)
    one = tl.full((WARPS * 32,), 0x3F803F80 if tl.bfloat16 == HALF else 0x3C003C00, tl.uint32)
    for b in tl.static_range(4):
        kept, sums = (), ()
        for f in tl.static_range(RT):
            g_row = decode(read[2 * (RT * b + f)], base, pairs, KIND, INTERPRETED)
            h_row = decode(read[2 * (RT * b + f) + 1], base, pairs, KIND, INTERPRETED)
            for n in tl.static_range(NT):
                part = block(g_row, h_row, xs[b // SLOTS * NT + n], WARPS, HALF, INTERPRETED)
                if b % SLOTS > 0:
                    part = _picked(picked[NT * f + n], part, t, b % SLOTS, SLOTS)
                kept = kept + (part,)
        picked = kept
        new = new + _codes(lines, four, b, live, K64, KIND, RT, INTERPRETED)
        if b % SLOTS == SLOTS - 1:
            for f in tl.static_range(RT):
                s, z = picked[0], picked[0]
                if KIND == "four":
                    s = _spread(scales, f, b // SLOTS, t, SLOTS, WARPS, INTERPRETED)
                if ZERO != "none":
                    z = _spread(zeros, f, b // SLOTS, t, SLOTS, WARPS, INTERPRETED)
                for n in tl.static_range(NT):
                    ones = picked[0]
                    if ZERO != "none":
                        ones = block((one,) * 8, (one,) * 8, xs[b // SLOTS * NT + n], WARPS, HALF, INTERPRETED)
                    sums = sums + (_added(acc[NT * f + n], picked[NT * f + n], s, z, ones, KIND, ZERO),)
            acc = sums
    return acc, new, coming


@triton.jit(do_not_specialize=["M", "tiles"])
def _gemv(
    out, x, add, segments, pairs, nested_levels, xa, norm, feed, fed, scratch,
    M, x_stride, out_stride, add_stride, multiplier, tiles, eps, offset,
    K64: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, SEGMENTS: tl.constexpr,
    PAIRED: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, RT: tl.constexpr,
    SLOTS: tl.constexpr, NT: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, OUT: tl.constexpr, WARPS: tl.constexpr,
    HALF: tl.constexpr, SHARED: tl.constexpr, SUMS: tl.constexpr, XA: tl.constexpr, ROW_BYTES: tl.constexpr, KEEP: tl.constexpr,
    A_ROWS: tl.constexpr, PIECES: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr, FEED: tl.constexpr,
    PDL: tl.constexpr, AHEAD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = add + multiplier * (x W^T + bias + B (A x)), or act(first) * second of two segments' outputs (PAIRED).

    NORM: x goes through an RMS norm first. PIECES: of A x, added here. FEED: columns of `feed` `[N, FEED]`, by which this program's
    outputs are multiplied and added up into its line of `fed`: A x of the group that reads `out`.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    tid = tl.arange(0, WARPS * 32)
    g, t, mine = tid % 32 // 4, tid % 4, tid // 32 * 4
    STEPS: tl.constexpr = (K64 + 4 * WARPS - 1) // (4 * WARPS)
    tall: tl.constexpr = 16 if PAIRED else 16 * RT
    program = tl.program_id(0)
    position, last = program * tiles // tl.num_programs(0), (program + 1) * tiles // tl.num_programs(0)
    lines = _lines(segments, position, g, t, K64, KIND, SEGMENTS, PAIRED, RT)
    read = _first_codes(lines, mine, tid >= 0, K64, KIND, RT, INTERPRETED)
    raw = _raw_scales(segments, lines, mine, t, tid >= 0, K64, KIND, NESTED, PER, ZERO, RT)
    for i in tl.static_range(1, AHEAD):
        if position + i < last:
            _fetch(segments, position + i, ROW_BYTES, SEGMENTS, PAIRED, RT)
    base, sums_at, levels_at = tid, 0, 0
    if not INTERPRETED:
        start = tl.inline_asm_elementwise(
            SHARED, "=&r,l,l", [pairs.to(tl.int64), nested_levels.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
        base, sums_at, levels_at = start + tid % 32 * 4, start + SUMS, start + TABLE_BYTES
        tl.debug_barrier()
    xs, weights = (), ()
    for step in tl.static_range(STEPS if NORM else 0):
        weights = weights + x_of_four(norm, 0, 8, mine + step * WARPS * 4, g, t, K64, SLOTS, NT, INTERPRETED)
    if PDL:
        cuda.gdc_wait()
    for step in tl.static_range(STEPS if KEEP else 0):
        xs = xs + x_of_four(x, x_stride, M, mine + step * WARPS * 4, g, t, K64, SLOTS, NT, INTERPRETED)
    if GROUPS > 0:
        put_pieces(xa, sums_at, scratch, tid, A_ROWS, PIECES, GROUPS, WIDE, XA, ROWS, INTERPRETED)
    o, m = tl.arange(0, OUT), tl.arange(0, ROWS)
    rstd, total = m * 0 + 1.0, (tl.zeros((ROWS, 16), tl.float32),) * (FEED // 16)
    if NORM:
        xs, rstd = normed(xs, weights, eps, offset, STEPS, K64, ROWS, WARPS, HALF, INTERPRETED)
    while position < last:
        stop = tl.minimum(position + BATCH, last)
        tile = position + o // tall
        s, one = _segment(segments, tl.minimum(tile, last - 1), SEGMENTS, PAIRED), _segment(segments, position, SEGMENTS, PAIRED)
        row = (tile - field(segments, s, 10)) * tall + o % tall
        alive = (tile < stop) & (row < field(segments, s, 8))
        side, bs = side_of(segments, s, one, row, alive, xa, M, A_ROWS, BIAS, RANK, ROWS, OUT, HALF, GROUPS, INTERPRETED)
        other, others = side, bs
        if PAIRED:
            other, others = side_of(
                segments, s + 1, one + 1, row, alive, xa, M, A_ROWS, BIAS, RANK, ROWS, OUT, HALF, GROUPS, INTERPRETED
            )  # fmt: skip
        column = (field(segments, s, 9) + row)[:, None]
        mask = alive[:, None] & (m < M)[None, :]
        if ADD:
            before = tl.load(add + m[None, :] * add_stride + column, mask=mask, other=0.0)
        number = position
        while number < stop:
            acc = ((tl.zeros((WARPS * 32,), tl.float32),) * 4,) * (RT * NT)
            if KEEP:
                for step in tl.static_range(STEPS):
                    if step == STEPS - 1:
                        lines = _next_lines(lines, segments, number + 1, g, t, K64, KIND, SEGMENTS, PAIRED, RT)
                    live = tid * 0 + (number if step == STEPS - 1 else position) < (last - 1 if step == STEPS - 1 else last)
                    acc, read, raw = _four_blocks(
                        acc, read, raw, xs[step * (4 // SLOTS) * NT : (step + 1) * (4 // SLOTS) * NT], segments, lines,
                        mine + (step + 1) % STEPS * WARPS * 4, live, t, base, levels_at, pairs, nested_levels,
                        K64, KIND, NESTED, PER, ZERO, RT, SLOTS, NT, WARPS, HALF, INTERPRETED,
                    )  # fmt: skip
            else:
                done = 0
                while done < STEPS:
                    now = x_of_four(x, x_stride, M, mine + done * (WARPS * 4), g, t, K64, SLOTS, NT, INTERPRETED)
                    done += 1
                    if done == STEPS:
                        lines = _next_lines(lines, segments, number + 1, g, t, K64, KIND, SEGMENTS, PAIRED, RT)
                    acc, read, raw = _four_blocks(
                        acc, read, raw, now, segments, lines, mine + done % STEPS * (WARPS * 4),
                        (tid * 0 + done < STEPS) | (tid * 0 + number < last - 1), t, base, levels_at, pairs, nested_levels,
                        K64, KIND, NESTED, PER, ZERO, RT, SLOTS, NT, WARPS, HALF, INTERPRETED,
                    )  # fmt: skip
            if AHEAD > 0 and number + AHEAD < last:
                _fetch(segments, number + AHEAD, ROW_BYTES, SEGMENTS, PAIRED, RT)
            put_sums(acc, number - position, sums_at, scratch, tid, RT, SLOTS, NT, ROWS, WARPS, INTERPRETED)
            number += 1
        tl.debug_barrier()
        y = whole(0, o, sums_at, scratch, RT, PAIRED, BATCH, ROWS, WARPS, INTERPRETED)
        z = y
        if PAIRED:
            z = whole(1, o, sums_at, scratch, RT, PAIRED, BATCH, ROWS, WARPS, INTERPRETED)
        if KIND == "int8":
            y = row_scaled(y, segments, s, row, alive)
            if PAIRED:
                z = row_scaled(z, segments, s + 1, row, alive)
        if GROUPS > 0:
            y += of_pieces(bs, rstd, segments, s, sums_at, scratch, RANK, ROWS, OUT, GROUPS, WIDE, XA, INTERPRETED)
            if PAIRED:
                z += of_pieces(others, rstd, segments, s + 1, sums_at, scratch, RANK, ROWS, OUT, GROUPS, WIDE, XA, INTERPRETED)
        y = finished(y + side, z + other, PAIRED, ACT) * multiplier
        if ADD:
            y += before.to(tl.float32)
        y = to_dtype(y, out.dtype.element_ty, INTERPRETED)
        tl.store(out + m[None, :] * out_stride + column, y, mask=mask)
        if FEED > 0:
            total = fed_by(total, y, feed, column, mask, alive, FEED)
        tl.debug_barrier()
        position = stop
    if FEED > 0:
        keep_fed(total, fed, program, M, ROWS, FEED)
