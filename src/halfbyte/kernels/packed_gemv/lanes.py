"""What one thread does with its numbers: reads codes, looks levels up, multiplies on the tensor cores. Used by the kernel alone.

Arrays have one element a thread, in the order of threads, so that no data moves between them unseen. The columns of a product may
be summed in any order, so lane t of four takes 16 neighbouring codes of a block of 64 (8 bytes) where the tensor core would have
them interleaved, and x alike.

Letters: K64 blocks of 64 columns a row, M rows of x; g = lane / 4 is a row of a product's 16 (and g + 8), t = lane % 4.
"""

# Kernels are typed by Triton, whose decorator is not.
# Tuples grow in unrolled loops, and Triton knows no `(*tuple, element)`.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.kernels.dequantize.fused import to_dtype
from halfbyte.kernels.packed_gemv import ptx

LOOKUP = tl.constexpr(ptx.LOOKUP)
MMA_BF16 = tl.constexpr(ptx.MMA_BF16)
MMA_FP16 = tl.constexpr(ptx.MMA_FP16)
QUAD = tl.constexpr(ptx.QUAD)
FLIP = tl.constexpr(ptx.FLIP)
MERGE = tl.constexpr(ptx.MERGE)
TWO_WORDS = tl.constexpr(ptx.TWO_WORDS)
X_WORDS = tl.constexpr(ptx.X_WORDS)
FOUR_WORDS = tl.constexpr(ptx.FOUR_WORDS)
PUT = tl.constexpr(ptx.PUT)
GET = tl.constexpr(ptx.GET)


@triton.jit
def lookup(word, base, pairs, INTERPRETED: tl.constexpr):
    """uint32 of four bytes to four pairs of levels."""
    if INTERPRETED:
        return (tl.load(pairs + (word & 255)), tl.load(pairs + (word >> 8 & 255)), tl.load(pairs + (word >> 16 & 255)),
                tl.load(pairs + (word >> 24)))  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            LOOKUP, "=&r,=&r,=&r,=&r,r,r", [word, base], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1
        )


@triton.jit
def merge(low, high, INTERPRETED: tl.constexpr):
    """The low half of one register and the high half of another."""
    if INTERPRETED:
        return (low & 0xFFFF) | (high & 0xFFFF0000)
    else:
        return tl.inline_asm_elementwise(MERGE, "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def product(acc, a, b, HALF: tl.constexpr):
    """acc + A B. a: rows g, g + 8, twice; b: the same columns of row g of x; acc: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)."""
    return tl.inline_asm_elementwise(
        MMA_BF16 if tl.bfloat16 == HALF else MMA_FP16, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b[0], b[1], acc[0], acc[1], acc[2], acc[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def numbers(words, WARPS: tl.constexpr, HALF: tl.constexpr):
    """Eight registers of two 16-bit numbers a lane as fp32 `[WARPS, 8 g, 64 columns]`; for the interpreter."""
    both = tl.reshape(tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3])), (WARPS, 8, 16))
    more = tl.reshape(tl.join(tl.join(words[4], words[5]), tl.join(words[6], words[7])), (WARPS, 8, 16))
    word = tl.reshape(tl.join(both, more), (WARPS, 8, 32))
    low = (word & 0xFFFF).to(tl.uint16).to(HALF, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(low, (word >> 16).to(tl.uint16).to(HALF, bitcast=True).to(tl.float32)), (WARPS, 8, 64))


@triton.jit
def block(g_row, h_row, x, WARPS: tl.constexpr, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """16 rows by 64 columns by 8 rows of x: four products."""
    zero = tl.zeros((WARPS * 32,), tl.float32)
    if INTERPRETED:
        xs = tl.reshape(numbers(x, WARPS, HALF), (WARPS, 1, 8, 64))
        top = tl.sum(tl.reshape(numbers(g_row, WARPS, HALF), (WARPS, 8, 1, 64)) * xs, 3)
        bottom = tl.sum(tl.reshape(numbers(h_row, WARPS, HALF), (WARPS, 8, 1, 64)) * xs, 3)
        t0, t1 = tl.split(tl.reshape(top, (WARPS * 32, 2)))
        b0, b1 = tl.split(tl.reshape(bottom, (WARPS * 32, 2)))
        return t0, t1, b0, b1
    else:
        acc = (zero,) * 4
        acc = product(acc, (g_row[0], h_row[0], g_row[1], h_row[1]), (x[0], x[1]), HALF)
        acc = product(acc, (g_row[2], h_row[2], g_row[3], h_row[3]), (x[2], x[3]), HALF)
        acc = product(acc, (g_row[4], h_row[4], g_row[5], h_row[5]), (x[4], x[5]), HALF)
        return product(acc, (g_row[6], h_row[6], g_row[7], h_row[7]), (x[6], x[7]), HALF)


@triton.jit
def of_quad(value, lane, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The value that lane `lane` (int32, one a thread) of the four holds."""
    if INTERPRETED:
        quads = tl.reshape(value, (WARPS * 8, 1, 4))
        wanted = tl.reshape(lane, (WARPS * 8, 4, 1)) == tl.arange(0, 4)[None, None, :]
        return tl.reshape(tl.sum(tl.where(wanted, quads, 0.0), 2), (WARPS * 32,))
    else:
        return tl.inline_asm_elementwise(QUAD, "=f,f,r", [value, lane], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def met(y, z, second, flip: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """y + the partner's y, or z + the partner's z in lanes that are `second`; partners' numbers differ by the bits `flip`, and one
    of them is second."""
    kept, given = tl.where(second, z, y), tl.where(second, y, z)
    if INTERPRETED:
        lane = tl.arange(0, 32)
        partner = (lane[None, :, None] ^ flip) == lane[None, None, :]
        return kept + tl.reshape(tl.sum(tl.where(partner, tl.reshape(given, (WARPS, 1, 32)), 0.0), 2), (WARPS * 32,))
    else:
        flips = tl.full((WARPS * 32,), flip, tl.int32)
        return kept + tl.inline_asm_elementwise(FLIP, "=f,f,r", [given, flips], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def two(long):
    return long.to(tl.uint32), (long >> 32).to(tl.uint32)


@triton.jit
def words(p, live, KIND: tl.constexpr, INTERPRETED: tl.constexpr):
    """What a lane reads of a block of 64 columns of a row, at p (uint64), where live: 2, 4 or 8 registers."""
    if INTERPRETED:
        read = two(tl.load(p, mask=live, other=0))
        if KIND != "four":
            read = read + two(tl.load(p + 1, mask=live, other=0))
        if KIND == "dense":
            read = read + two(tl.load(p + 2, mask=live, other=0)) + two(tl.load(p + 3, mask=live, other=0))
        return read
    elif KIND == "four":
        return tl.inline_asm_elementwise(
            TWO_WORDS, "=r,=r,l,r", [p, live.to(tl.int32)], dtype=(tl.uint32, tl.uint32), is_pure=False, pack=1
        )
    elif KIND == "int8":
        return four_words(p, live)
    else:
        return four_words(p, live) + four_words(p + 2, live)


@triton.jit
def four_words(p, live):
    return tl.inline_asm_elementwise(
        FOUR_WORDS, "=r,=r,=r,=r,l,r", [p, live.to(tl.int32)], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def decode(read, base, pairs, KIND: tl.constexpr, INTERPRETED: tl.constexpr):
    """What was read as eight registers of two 16-bit levels."""
    if KIND == "dense":
        return read
    elif KIND == "int8":
        a, b = lookup(read[0], base, pairs, INTERPRETED), lookup(read[1], base, pairs, INTERPRETED)
        c, d = lookup(read[2], base, pairs, INTERPRETED), lookup(read[3], base, pairs, INTERPRETED)
        return (merge(a[0], a[1], INTERPRETED), merge(a[2], a[3], INTERPRETED), merge(b[0], b[1], INTERPRETED),
                merge(b[2], b[3], INTERPRETED), merge(c[0], c[1], INTERPRETED), merge(c[2], c[3], INTERPRETED),
                merge(d[0], d[1], INTERPRETED), merge(d[2], d[3], INTERPRETED))  # fmt: skip
    else:
        low, high = lookup(read[0], base, pairs, INTERPRETED), lookup(read[1], base, pairs, INTERPRETED)
        return low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]


@triton.jit
def columns_of_x(x, stride, k_block, m, t, mask, WIDE: tl.constexpr):
    """Row m of x at a lane's 16 columns of a block: eight registers of two. WIDE: by 16 bytes, at a multiple of which it starts."""
    p = x.to(tl.pointer_type(tl.uint64)) + (m * stride + k_block * 64 + t * 16) // 4
    return _four_of_x(p, mask, WIDE) + _four_of_x(p + 2, mask, WIDE)


@triton.jit
def _four_of_x(p, mask, WIDE: tl.constexpr):
    if not WIDE:
        return two(tl.load(p, mask=mask, other=0)) + two(tl.load(p + 1, mask=mask, other=0))
    else:
        return tl.inline_asm_elementwise(
            X_WORDS, "=&r,=&r,=&r,=&r,l,r", [p, mask.to(tl.int32)], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def halves(word, HALF: tl.constexpr):
    """The two 16-bit numbers of a register in fp32."""
    return ((word & 0xFFFF).to(tl.uint16).to(HALF, bitcast=True).to(tl.float32),
            (word >> 16).to(tl.uint16).to(HALF, bitcast=True).to(tl.float32))  # fmt: skip


@triton.jit
def both(low, high, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """Two fp32 numbers rounded into a register."""
    low = to_dtype(low, HALF, INTERPRETED).to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (to_dtype(high, HALF, INTERPRETED).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def x_of_four(
    x, stride, M, four, g, t, K64: tl.constexpr, SLOTS: tl.constexpr, NT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x for four blocks: SLOTS blocks at a time, for each eight rows of x."""
    xs = ()
    for j in tl.static_range(4 // SLOTS):
        for n in tl.static_range(NT):
            m, b = g // SLOTS + 8 * n, four + j * SLOTS + g % SLOTS
            xs = xs + (columns_of_x(x, stride, b, m, t, (m < M) & (b < K64), SLOTS == 1 and not INTERPRETED),)
    return xs


@triton.jit
def normed(
    xs, weights, eps, offset, STEPS: tl.constexpr, K64: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, HALF: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x through an RMS norm, rounded, for up to two rows; and 1 / rms of each, `[ROWS]`."""
    square = tl.zeros((WARPS * 32,), tl.float32)
    for i in tl.static_range(STEPS):
        for j in tl.static_range(8):
            low, high = halves(xs[i][j], HALF)
            square += low * low + high * high
    rstd = tl.rsqrt(tl.sum(tl.sum(tl.reshape(square, (WARPS, 2, 16)), 2), 0) / (K64 * 64) + eps)
    factor = tl.reshape(tl.broadcast_to(rstd[None, :, None], (WARPS, 2, 16)), (WARPS * 32,))
    normed = ()
    for i in tl.static_range(STEPS):
        words = ()
        for j in tl.static_range(8):
            low, high = halves(xs[i][j], HALF)
            w_low, w_high = halves(weights[i][j], HALF)
            words = words + (both(low * factor * (w_low + offset), high * factor * (w_high + offset), HALF, INTERPRETED),)
        normed = normed + (words,)
    if ROWS == 1:
        rstd = tl.sum(tl.where(tl.arange(0, 2) == 0, rstd, 0.0), 0) + tl.zeros((1,), tl.float32)
    return normed, rstd


@triton.jit
def put(base, scratch, at, value, mask, INTERPRETED: tl.constexpr):
    """value as number `at` of the sums, in shared memory."""
    if INTERPRETED:
        tl.store(scratch + at, value, mask=mask)
    else:
        tl.inline_asm_elementwise(PUT, "=r,r,f,r", [base + at * 4, value, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def get(base, scratch, at, INTERPRETED: tl.constexpr):
    """Number `at` of the sums."""
    if INTERPRETED:
        return tl.load(scratch + at)
    else:
        return tl.inline_asm_elementwise(GET, "=f,r", [base + at * 4], dtype=tl.float32, is_pure=False, pack=1)
