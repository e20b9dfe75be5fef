"""What happens to sums: warps' sums meet in shared memory, B (A x), bias, activation and residual join, and the outputs are fed on.

A x of a group is a few numbers that all outputs need. It comes whole in global memory, or in pieces, one a program of the launch in
front, which every program here adds up for itself: nobody waits for a sum that another one makes.

Letters: M rows of x, ROWS of them kept, OUT outputs of a batch of tiles, R columns of A x.
"""

# Kernels are typed by Triton, whose decorator is not.
# Tuples grow in unrolled loops, and Triton knows no `(*tuple, element)`.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.kernels.packed_gemv.lanes import get, met, put


@triton.jit
def field(segments, s, n: tl.constexpr):
    """Of a segment's line: codes, scales, nested scales, offset, zeros, bias, B (addresses); first row, rows, first output, first
    tile, first column of A x. Every address waits for it, so the L2 cache keeps it while the weights stream through."""
    return tl.load(segments + s * 12 + n, eviction_policy="evict_last")


@triton.jit
def put_sums(
    acc, place, sums_at, scratch, tid,
    RT: tl.constexpr, SLOTS: tl.constexpr, NT: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A warp's sums of a tile, the tile's place in its batch, for the ROWS rows of x: `[place, RT, WARPS, ROWS, 16]`.

    Where SLOTS blocks stand side by side, their lanes' sums meet on the way, and each of those lanes keeps other rows.
    """
    warp, g, t = tid // 32, tid % 32 // 4, tid % 4
    for f in tl.static_range(RT):
        start = ((place * RT + f) * WARPS + warp) * (ROWS * 16)
        for n in tl.static_range(NT):
            if SLOTS == 1:
                c = acc[NT * f + n]
                for h in tl.static_range(2):
                    at = start + (8 * n + 2 * t) * 16 + 8 * h + g
                    put(sums_at, scratch, at, c[2 * h], t < 4, INTERPRETED)
                    put(sums_at, scratch, at + 16, c[2 * h + 1], t < 4, INTERPRETED)
            elif SLOTS == 2:
                c, d = acc[NT * 2 * f + n], acc[NT * (2 * f + 1) + n]
                for h in tl.static_range(2):
                    y = met(c[h], d[h], g % 2 == 1, 4, WARPS, INTERPRETED)
                    put(sums_at, scratch, start + t * 16 + g % 2 * 8 + 4 * h + g // 2, y, t < ROWS, INTERPRETED)
            else:
                mine = (g % 4 // 2 == t % 2) & (t // 2 < ROWS)
                a, b, c, d = acc[4 * f], acc[4 * f + 1], acc[4 * f + 2], acc[4 * f + 3]
                for h in tl.static_range(2):
                    y = met(a[h], c[h], g % 2 == 1, 4, WARPS, INTERPRETED)
                    z = met(b[h], d[h], g % 2 == 1, 4, WARPS, INTERPRETED)
                    y = met(y, z, g % 4 > 1, 9, WARPS, INTERPRETED)
                    at = start + t // 2 * 16 + g % 2 * 8 + g % 4 // 2 * 4 + 2 * h + g // 4
                    put(sums_at, scratch, at, y, mine, INTERPRETED)


@triton.jit
def whole(
    f, o, sums_at, scratch, RT: tl.constexpr, PAIRED: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The sums over warps of outputs o of a batch, `[OUT, ROWS]`; part f where two are paired."""
    last: tl.constexpr = BATCH * (1 if PAIRED else RT) - 1
    sixteen = tl.minimum(o // 16, last)
    first = (sixteen * 2 + f if PAIRED else sixteen) * (WARPS * ROWS * 16) + o % 16
    at = first[:, None] + tl.arange(0, ROWS)[None, :] * 16
    y = get(sums_at, scratch, at, INTERPRETED)
    for w in tl.static_range(1, WARPS):
        y += get(sums_at, scratch, at + w * ROWS * 16, INTERPRETED)
    return y


@triton.jit
def _activated(z, ACT: tl.constexpr):
    if ACT == "silu":
        return z / (1 + tl.exp(-z))
    elif ACT == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        inner = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        return z / (1 + tl.exp(-inner))
    elif ACT == "relu2":
        return tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    else:
        return tl.maximum(z, 0.0)


@triton.jit
def finished(y, z, PAIRED: tl.constexpr, ACT: tl.constexpr):
    """act(y) z, act(y) or y."""
    if ACT != "none":
        y = _activated(y, ACT)
    return y * z if PAIRED else y


@triton.jit
def feed_lines(feed, column, alive, FEED: tl.constexpr):
    """Lines `column` of `feed`, 16 columns at a time `[OUT, 16]`: asked for before the outputs are there."""
    r = tl.arange(0, 16)
    lines = ()
    for i in tl.static_range(FEED // 16):
        at = column * FEED + i * 16 + r[None, :]
        lines = lines + (tl.load(feed + at, mask=alive[:, None] & (r < 16)[None, :], other=0.0),)
    return lines


@triton.jit
def fed_by(total, y, lines, mask, FEED: tl.constexpr):
    """total (16 columns of `feed` each, `[OUT, ROWS, 16]`) + outputs y `[OUT, ROWS]` times their lines of `feed`."""
    y = tl.where(mask, y.to(tl.float32), 0.0)
    more = ()
    for i in tl.static_range(FEED // 16):
        more = more + (total[i] + y[:, :, None] * lines[i].to(tl.float32)[:, None, :],)
    return more


@triton.jit
def keep_fed(total, fed, program, M, ROWS: tl.constexpr, FEED: tl.constexpr):
    """A program's line of A x for the group that reads its outputs."""
    m, r = tl.arange(0, ROWS)[:, None], tl.arange(0, 16)[None, :]
    for i in tl.static_range(FEED // 16):
        tl.store(fed + (program * 2 + m) * FEED + i * 16 + r, tl.sum(total[i], 0), mask=(m < M) & (r < 16))


@triton.jit
def _times(b, ax, y, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """y + b ax on the tensor cores; ax, fp32, as the sum of two 16-bit numbers."""
    if INTERPRETED:
        return y + tl.dot(b.to(tl.float32), ax, input_precision="ieee")
    else:
        high = ax.to(HALF)
        return tl.dot(b, (ax - high.to(tl.float32)).to(HALF), tl.dot(b, high, y))


@triton.jit
def side_of(
    segments, s, one, row, alive, xa, M, A_ROWS,
    BIAS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What depends on no column of W, for outputs `row` of segments s (of segment `one` where a batch is a single tile): bias +
    B (A x), `[OUT, ROWS]`; where A x is still in pieces, the bias, and B for later: 16 ranks at a time `[OUT, 16]`."""
    m, r = tl.arange(0, ROWS), tl.arange(0, 16)
    absolute = field(segments, s, 7) + row
    y, bs = tl.zeros((OUT, ROWS), tl.float32), ()
    if BIAS:
        bias = field(segments, s, 5)
        y += tl.load(bias.to(tl.pointer_type(HALF)) + absolute, mask=alive & (bias != 0), other=0.0).to(tl.float32)[:, None]
    for r0 in tl.static_range(0, RANK, 16):
        p = field(segments, s, 6).to(tl.pointer_type(HALF)) + absolute * RANK + r0
        b = tl.load(p[:, None] + r[None, :], mask=alive[:, None] & (r < 16)[None, :], other=0.0)
        if GROUPS > 0:
            bs = bs + (b,)
        elif ROWS == 16:
            place = (field(segments, one, 11) + r0 + r)[:, None] + (m * A_ROWS)[None, :]
            ax = tl.load(xa + place, mask=(m < M)[None, :] & (r < 16)[:, None], other=0.0)
            y = _times(b, ax, y, HALF, INTERPRETED)
        else:
            at = (m * A_ROWS)[None, :, None] + (field(segments, s, 11) + r0)[:, None, None] + r[None, None, :]
            ax = tl.load(xa + at, mask=alive[:, None, None] & (m < M)[None, :, None] & (r < 16)[None, None, :], other=0.0)
            y += tl.sum(b.to(tl.float32)[:, None, :] * ax, 2)
    return y, bs


@triton.jit
def put_pieces(
    xa, sums_at, scratch, tid, A_ROWS: tl.constexpr, PIECES: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
    XA: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the pieces of A x up to GROUPS of them, in shared memory: `[ROWS, GROUPS, WIDE]` at number XA of the sums."""
    r, group = tid % WIDE, tid // WIDE
    for m in tl.static_range(ROWS):
        total = tl.zeros(tid.shape, tl.float32)
        for i in tl.static_range((PIECES + GROUPS - 1) // GROUPS):
            mask = (group + i * GROUPS < PIECES) & (group < GROUPS) & (r < A_ROWS)
            total += tl.load(xa + ((group + i * GROUPS) * 2 + m) * A_ROWS + r, mask=mask, other=0.0)
        put(sums_at, scratch, XA + m * GROUPS * WIDE + tid, total, group < GROUPS, INTERPRETED)


@triton.jit
def of_pieces(
    bs, rstd, segments, s, sums_at, scratch, RANK: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr,
    WIDE: tl.constexpr, XA: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """B (A x) from what `put_pieces` left, times rstd `[ROWS]`, `[OUT, ROWS]`."""
    y = tl.zeros((OUT, ROWS), tl.float32)
    first = field(segments, s, 11).to(tl.int32)[:, None, None]
    at = XA + first + (tl.arange(0, ROWS) * (GROUPS * WIDE))[None, :, None] + tl.arange(0, 16)[None, None, :]
    for r0 in tl.static_range(0, RANK, 16):
        ax = get(sums_at, scratch, at + r0, INTERPRETED)
        for i in tl.static_range(1, GROUPS):
            ax += get(sums_at, scratch, at + r0 + i * WIDE, INTERPRETED)
        y += tl.sum(bs[r0 // 16].to(tl.float32)[:, None, :] * ax, 2)
    return y * rstd[None, :]


@triton.jit
def row_scaled(y, segments, s, row, alive):
    """y times each row's own scale."""
    scales = field(segments, s, 1).to(tl.pointer_type(tl.float32))
    return y * tl.load(scales + field(segments, s, 7) + row, mask=alive, other=0.0)[:, None]
