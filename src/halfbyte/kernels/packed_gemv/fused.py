"""The Triton twin: every weight is read once, decoded through shared memory, and multiplied on the tensor cores for up to 16 rows
of x.

Why so: at the rate at which an H200 reads 4-bit weights, a multiprocessor has fewer than five instructions a weight. A byte holds
two codes and one look-up yields both levels as a register of two 16-bit numbers, which is what a tensor core's operand is: about
two instructions a weight in all, for one row of x or for eight. A product takes eight rows of x; with one or two, the columns of x
that would be empty hold other blocks of 64 of the same row (SLOTS of them), so that x stays in few registers; the weight's rows are
laid out alike (`tiles.py`).

As many programs as fit run at once and each walks over its tiles of rows: shared memory is filled once, and a tile's codes are
asked for while the one before is multiplied, so that memory never waits. Warps stand side by side along the columns and never wait
for each other inside a batch of tiles: their sums meet in shared memory, once a batch (`beside.py`). Weights do not depend on the
launch before, so they are asked for before that one has ended.

Letters: N rows of the weight, K columns, M rows of x; a tile is RT times 16 rows (16 of gate and of up); see also `tiles.py`.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from halfbyte.kernels.dequantize.fused import to_dtype
from halfbyte.kernels.packed_gemv import ptx
from halfbyte.kernels.packed_gemv.beside import (
    fed_by,
    feed_lines,
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
from halfbyte.kernels.packed_gemv.lanes import normed, x_of_four
from halfbyte.kernels.packed_gemv.tiles import fetch, first_codes, four_blocks, lines_of, next_lines, raw_scales, segment_of

TABLE_BYTES = tl.constexpr(ptx.TABLE_BYTES)


@triton.jit(do_not_specialize=["M", "tiles"])
def _gemv(
    out, x, add, segments, pairs, nested_levels, xa, norm, feed, fed, scratch,
    M, x_stride, out_stride, add_stride, multiplier, tiles, eps, offset,
    K64: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, SEGMENTS: tl.constexpr,
    PAIRED: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, RT: tl.constexpr,
    SLOTS: tl.constexpr, NT: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, OUT: tl.constexpr, WARPS: tl.constexpr,
    HALF: tl.constexpr, SHARED: tl.constexpr, SUMS: tl.constexpr, XA: tl.constexpr, ROW_BYTES: tl.constexpr, KEEP: tl.constexpr,
    A_ROWS: tl.constexpr, PIECES: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr, FEED: tl.constexpr,
    PDL: tl.constexpr, AHEAD: tl.constexpr, RAGGED: tl.constexpr, INTERPRETED: tl.constexpr,
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
    lines = lines_of(segments, position, g, t, K64, KIND, NESTED, ZERO, SEGMENTS, PAIRED, RT, SLOTS)
    read = first_codes(lines, mine, g, tid >= 0, K64, KIND, RT, SLOTS, RAGGED, INTERPRETED)
    raw = raw_scales(lines, mine, g, t, tid >= 0, K64, KIND, NESTED, PER, ZERO, RT, SLOTS, RAGGED)
    for i in tl.static_range(1, AHEAD):
        if position + i < last:
            fetch(segments, position + i, ROW_BYTES, SEGMENTS, PAIRED, RT)
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
    rstd, total = m * 0 + 1.0, (tl.zeros((OUT, ROWS, 16), tl.float32),) * (FEED // 16)
    if NORM:
        xs, rstd = normed(xs, weights, eps, offset, STEPS, K64, ROWS, WARPS, HALF, INTERPRETED)
    while position < last:
        stop = tl.minimum(position + BATCH, last)
        tile = position + o // tall
        s = segment_of(segments, tl.minimum(tile, last - 1), SEGMENTS, PAIRED)
        one = segment_of(segments, position, SEGMENTS, PAIRED)
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
        lines_fed = feed_lines(feed, column, alive, FEED)
        if ADD:
            before = tl.load(add + m[None, :] * add_stride + column, mask=mask, other=0.0)
        number = position
        while number < stop:
            acc = ((tl.zeros((WARPS * 32,), tl.float32),) * (4 if SLOTS == 1 else 2),) * (RT * SLOTS * NT)
            if KEEP:
                for step in tl.static_range(STEPS):
                    if step == STEPS - 1:
                        lines = next_lines(lines, segments, number + 1, g, t, K64, KIND, NESTED, ZERO, SEGMENTS, PAIRED, RT, SLOTS)
                    live = tid * 0 + (number if step == STEPS - 1 else position) < (last - 1 if step == STEPS - 1 else last)
                    acc, read, raw = four_blocks(
                        acc, read, raw, xs[step * (4 // SLOTS) * NT : (step + 1) * (4 // SLOTS) * NT], lines,
                        mine + (step + 1) % STEPS * WARPS * 4, live, g, t, base, levels_at, pairs, nested_levels,
                        K64, KIND, NESTED, PER, ZERO, RT, SLOTS, NT, WARPS, HALF, RAGGED, INTERPRETED,
                    )  # fmt: skip
            else:
                done = 0
                while done < STEPS:
                    now = x_of_four(x, x_stride, M, mine + done * (WARPS * 4), g, t, K64, SLOTS, NT, INTERPRETED)
                    done += 1
                    if done == STEPS:
                        lines = next_lines(lines, segments, number + 1, g, t, K64, KIND, NESTED, ZERO, SEGMENTS, PAIRED, RT, SLOTS)
                    acc, read, raw = four_blocks(
                        acc, read, raw, now, lines, mine + done % STEPS * (WARPS * 4),
                        (tid * 0 + done < STEPS) | (tid * 0 + number < last - 1), g, t, base, levels_at, pairs, nested_levels,
                        K64, KIND, NESTED, PER, ZERO, RT, SLOTS, NT, WARPS, HALF, RAGGED, INTERPRETED,
                    )  # fmt: skip
            if AHEAD > 0 and number + AHEAD < last:
                fetch(segments, number + AHEAD, ROW_BYTES, SEGMENTS, PAIRED, RT)
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
            total = fed_by(total, y, lines_fed, mask, FEED)
        tl.debug_barrier()
        position = stop
    if FEED > 0:
        keep_fed(total, fed, program, M, ROWS, FEED)
