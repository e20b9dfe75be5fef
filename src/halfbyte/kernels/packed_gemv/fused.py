"""The Triton twin: every weight is read once, decoded through shared memory, and multiplied on the tensor cores for up to 16 rows
of x.

Why so: at the rate at which an H200 reads 4-bit weights, a multiprocessor has fewer than five instructions a weight. A byte holds
two codes and one look-up yields both levels as a register of two 16-bit numbers, which is what a tensor core's operand is: about
three instructions a weight in all, for one row of x or for eight. So that no data moves between threads, the kernel is written by
lane: arrays have one element a thread, in the order of threads. The columns of a product may be summed in any order, so lane t of
four takes 16 neighbouring codes of a block of 64 (8 bytes) where the tensor core would have them interleaved, and x alike. A
block's scale multiplies its partial sum in fp32, once. An adapter's A is 16-bit rows multiplied by the first programs of the
launch; the others add B (A x) last, when a counter says that it is there. Programs are numbered as they start (a ticket), so
whoever is waited for is running.

Letters: N rows of the weight, K columns, M rows of x; a tile is 16 rows; g = lane / 4 is a row of the tile, t = lane % 4.
"""

# Kernels are typed by Triton, whose decorator is not.
# Tuples grow in unrolled loops, and Triton knows no `(*tuple, element)`.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from halfbyte.kernels.dequantize.fused import to_dtype
from halfbyte.kernels.packed_gemv import ptx

LOOKUP = tl.constexpr(ptx.LOOKUP)
MMA_BF16 = tl.constexpr(ptx.MMA_BF16)
MMA_FP16 = tl.constexpr(ptx.MMA_FP16)
QUAD = tl.constexpr(ptx.QUAD)
MERGE = tl.constexpr(ptx.MERGE)
PREFETCH = tl.constexpr(ptx.PREFETCH)
FIELDS = 12
"""Of a segment's line: codes, scales, nested scales, offset, zeros, bias, B (addresses); first row, rows, first output, first tile,
first row of A."""


@triton.jit
def _lookup(word, base, pairs, INTERPRETED: tl.constexpr):
    """uint32 of four bytes to four pairs of levels."""
    if INTERPRETED:
        return (tl.load(pairs + (word & 255)), tl.load(pairs + (word >> 8 & 255)), tl.load(pairs + (word >> 16 & 255)),
                tl.load(pairs + (word >> 24)))  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            LOOKUP, "=&r,=&r,=&r,=&r,r,r", [word, base], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1
        )


@triton.jit
def _merge(low, high, INTERPRETED: tl.constexpr):
    """The low half of one register and the high half of another."""
    if INTERPRETED:
        return (low & 0xFFFF) | (high & 0xFFFF0000)
    else:
        return tl.inline_asm_elementwise(MERGE, "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _product(acc, a, b, HALF: tl.constexpr):
    """acc + A B. a: rows g, g + 8, twice; b: the same columns of row g of x; acc: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)."""
    return tl.inline_asm_elementwise(
        MMA_BF16 if tl.bfloat16 == HALF else MMA_FP16, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b[0], b[1], acc[0], acc[1], acc[2], acc[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _numbers(words, WARPS: tl.constexpr, HALF: tl.constexpr):
    """Eight registers of two 16-bit numbers a lane as fp32 `[WARPS, 8 g, 64 columns]`; for the interpreter."""
    both = tl.reshape(tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3])), (WARPS, 8, 16))
    more = tl.reshape(tl.join(tl.join(words[4], words[5]), tl.join(words[6], words[7])), (WARPS, 8, 16))
    word = tl.reshape(tl.join(both, more), (WARPS, 8, 32))
    low = (word & 0xFFFF).to(tl.uint16).to(HALF, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(low, (word >> 16).to(tl.uint16).to(HALF, bitcast=True).to(tl.float32)), (WARPS, 8, 64))


@triton.jit
def _block(acc, g_row, h_row, x, WARPS: tl.constexpr, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + 16 rows by 64 columns by 8 rows of x: four products."""
    if INTERPRETED:
        xs = tl.reshape(_numbers(x, WARPS, HALF), (WARPS, 1, 8, 64))
        top = tl.sum(tl.reshape(_numbers(g_row, WARPS, HALF), (WARPS, 8, 1, 64)) * xs, 3)
        bottom = tl.sum(tl.reshape(_numbers(h_row, WARPS, HALF), (WARPS, 8, 1, 64)) * xs, 3)
        t0, t1 = tl.split(tl.reshape(top, (WARPS * 32, 2)))
        b0, b1 = tl.split(tl.reshape(bottom, (WARPS * 32, 2)))
        return acc[0] + t0, acc[1] + t1, acc[2] + b0, acc[3] + b1
    else:
        acc = _product(acc, (g_row[0], h_row[0], g_row[1], h_row[1]), (x[0], x[1]), HALF)
        acc = _product(acc, (g_row[2], h_row[2], g_row[3], h_row[3]), (x[2], x[3]), HALF)
        acc = _product(acc, (g_row[4], h_row[4], g_row[5], h_row[5]), (x[4], x[5]), HALF)
        return _product(acc, (g_row[6], h_row[6], g_row[7], h_row[7]), (x[6], x[7]), HALF)


@triton.jit
def _of_quad(value, b: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The value that lane b of the four holds."""
    if INTERPRETED:
        quads = tl.reshape(value, (WARPS * 8, 4))
        picked = tl.sum(tl.where(tl.arange(0, 4)[None, :] == b, quads, 0.0), 1)
        return tl.reshape(tl.broadcast_to(picked[:, None], (WARPS * 8, 4)), (WARPS * 32,))
    else:
        return tl.inline_asm_elementwise(QUAD, "=f,f,r", [value, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _two(long):
    return long.to(tl.uint32), (long >> 32).to(tl.uint32)


@triton.jit
def _eight_words(p, at, mask):
    """16 numbers of 16 bits: eight registers of two."""
    a, b = _two(tl.load(p + at, mask=mask, other=0))
    c, d = _two(tl.load(p + at + 1, mask=mask, other=0))
    e, f = _two(tl.load(p + at + 2, mask=mask, other=0))
    g, h = _two(tl.load(p + at + 3, mask=mask, other=0))
    return a, b, c, d, e, f, g, h


@triton.jit
def _load(p, at, mask, KIND: tl.constexpr):
    """What a lane reads of a block of 64 columns of a row: 16 codes. at: the block's number from the start of the tensor, and t."""
    block, t = at
    if KIND == "dense":
        return _eight_words(p, block * 16 + t * 4, mask)
    elif KIND == "int8":
        a, b = _two(tl.load(p + block * 8 + t * 2, mask=mask, other=0))
        c, d = _two(tl.load(p + block * 8 + t * 2 + 1, mask=mask, other=0))
        return a, b, c, d
    else:
        return _two(tl.load(p + block * 4 + t, mask=mask, other=0))


@triton.jit
def _decode(read, base, pairs, KIND: tl.constexpr, INTERPRETED: tl.constexpr):
    """What was read as eight registers of two 16-bit levels."""
    if KIND == "dense":
        return read
    elif KIND == "int8":
        a, b = _lookup(read[0], base, pairs, INTERPRETED), _lookup(read[1], base, pairs, INTERPRETED)
        c, d = _lookup(read[2], base, pairs, INTERPRETED), _lookup(read[3], base, pairs, INTERPRETED)
        return (_merge(a[0], a[1], INTERPRETED), _merge(a[2], a[3], INTERPRETED), _merge(b[0], b[1], INTERPRETED),
                _merge(b[2], b[3], INTERPRETED), _merge(c[0], c[1], INTERPRETED), _merge(c[2], c[3], INTERPRETED),
                _merge(d[0], d[1], INTERPRETED), _merge(d[2], d[3], INTERPRETED))  # fmt: skip
    else:
        low, high = _lookup(read[0], base, pairs, INTERPRETED), _lookup(read[1], base, pairs, INTERPRETED)
        return low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]


@triton.jit
def _field(segments, s, n: tl.constexpr):
    return tl.load(segments + s * 12 + n)


@triton.jit
def _scale_of(segments, s, nested_levels, index, mask, NESTED: tl.constexpr):
    """fp32 scales at `index`."""
    if NESTED:
        code = tl.load(_field(segments, s, 1).to(tl.pointer_type(tl.uint8)) + index, mask=mask, other=0).to(tl.int32)
        outer = tl.load(_field(segments, s, 2).to(tl.pointer_type(tl.float32)) + index // 256, mask=mask, other=0.0)
        return tl.load(nested_levels + code) * outer + tl.load(_field(segments, s, 3).to(tl.pointer_type(tl.float32)))
    else:
        return tl.load(_field(segments, s, 1).to(tl.pointer_type(tl.float32)) + index, mask=mask, other=0.0)


@triton.jit
def _scaled(acc, part, ones, s_g, s_h, z_g, z_h, ZERO: tl.constexpr):
    """acc + scale * part, and what a zero point adds: `ones` holds the sums of x."""
    if ZERO == "none":
        return acc[0] + s_g * part[0], acc[1] + s_g * part[1], acc[2] + s_h * part[2], acc[3] + s_h * part[3]
    elif ZERO == "min":
        return (acc[0] + s_g * part[0] + z_g * ones[0], acc[1] + s_g * part[1] + z_g * ones[1],
                acc[2] + s_h * part[2] + z_h * ones[2], acc[3] + s_h * part[3] + z_h * ones[3])  # fmt: skip
    else:
        return (acc[0] + s_g * (part[0] - z_g * ones[0]), acc[1] + s_g * (part[1] - z_g * ones[1]),
                acc[2] + s_h * (part[2] - z_h * ones[2]), acc[3] + s_h * (part[3] - z_h * ones[3]))  # fmt: skip


@triton.jit
def _x(x, stride, block, m, t, M, mask):
    """Row m of x at a lane's 16 columns of a block: eight registers of two."""
    return _eight_words(x.to(tl.pointer_type(tl.uint64)), (m * stride + block * 64 + t * 16) // 4, mask & (m < M))


@triton.jit
def _columns(
    acc, codes, rows, alive, segments, s, nested_levels, x, x_stride, M, K64, first, last, base, pairs,
    STEPS: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, RT: tl.constexpr,
    NT: tl.constexpr, WARPS: tl.constexpr, HALF: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds columns 64 first .. 64 last of RT tiles to their sums acc[NT * tile + half of x's rows], four blocks a warp at a time.

    codes, s: RT addresses and segments; rows, alive: rows g and g + 8 of each tile.
    """
    tid = tl.arange(0, WARPS * 32)
    g, t = tid % 32 // 4, tid % 4
    for step in range(STEPS):
        four = first + (step * WARPS + tid // 32) * 4
        read, scales, zeros = (), (), ()
        for f in tl.static_range(RT):
            for h in tl.static_range(2):
                for b in tl.static_range(4):
                    block = rows[2 * f + h] * K64 + four + b
                    read = read + (_load(codes[f], (block, t), alive[2 * f + h] & (four + b < last), KIND),)
                if KIND == "four":
                    index, inside = (rows[2 * f + h] * K64 + four + t) // PER, alive[2 * f + h] & (four + t < last)
                    scales = scales + (_scale_of(segments, s[f], nested_levels, index, inside, NESTED),)
                    if ZERO != "none":
                        z = tl.load(_field(segments, s[f], 4).to(tl.pointer_type(tl.float32)) + index, mask=inside, other=0.0)
                        zeros = zeros + (z,)
        for b in tl.static_range(4):
            for n in tl.static_range(NT):
                xs = _x(x, x_stride, four + b, g + 8 * n, t, M, four + b < last)
                none = (tl.zeros((WARPS * 32,), tl.float32),) * 4
                ones = none
                if ZERO != "none":
                    one = tl.full((WARPS * 32,), 0x3F803F80 if tl.bfloat16 == HALF else 0x3C003C00, tl.uint32)
                    ones = _block(none, (one,) * 8, (one,) * 8, xs, WARPS, HALF, INTERPRETED)
                new = ()
                for f in tl.static_range(RT):
                    for other in tl.static_range(NT):
                        part = acc[NT * f + other]
                        if other == n:
                            g_row = _decode(read[8 * f + b], base, pairs, KIND, INTERPRETED)
                            h_row = _decode(read[8 * f + 4 + b], base, pairs, KIND, INTERPRETED)
                            if KIND == "four":
                                product = _block(none, g_row, h_row, xs, WARPS, HALF, INTERPRETED)
                                s_g = _of_quad(scales[2 * f], b, WARPS, INTERPRETED)
                                s_h = _of_quad(scales[2 * f + 1], b, WARPS, INTERPRETED)
                                z_g, z_h = s_g, s_h
                                if ZERO != "none":
                                    z_g = _of_quad(zeros[2 * f], b, WARPS, INTERPRETED)
                                    z_h = _of_quad(zeros[2 * f + 1], b, WARPS, INTERPRETED)
                                part = _scaled(part, product, ones, s_g, s_h, z_g, z_h, ZERO)
                            else:
                                part = _block(part, g_row, h_row, xs, WARPS, HALF, INTERPRETED)
                        new = new + (part,)
                acc = new
    return acc


@triton.jit
def _sums(acc, WARPS: tl.constexpr):
    """The lanes' sums of all warps as `[16 rows, 8 rows of x]`."""
    c0 = tl.sum(tl.reshape(acc[0], (WARPS, 8, 4)), 0)
    c1 = tl.sum(tl.reshape(acc[1], (WARPS, 8, 4)), 0)
    c2 = tl.sum(tl.reshape(acc[2], (WARPS, 8, 4)), 0)
    c3 = tl.sum(tl.reshape(acc[3], (WARPS, 8, 4)), 0)
    top, bottom = tl.reshape(tl.join(c0, c1), (8, 8)), tl.reshape(tl.join(c2, c3), (8, 8))
    return tl.reshape(tl.permute(tl.join(top, bottom), (2, 0, 1)), (16, 8))


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
def _finished(
    y, segments, s, row, n, M, xa, A_ROWS,
    KIND: tl.constexpr, RANK: tl.constexpr, SLICES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y `[16, 8]` of x's rows 8 n ..: a row's own scale, bias, and B (A x)."""
    rows = row + tl.arange(0, 16)
    absolute = _field(segments, s, 7) + rows
    alive = rows < _field(segments, s, 8)
    m = 8 * n + tl.arange(0, 8)
    if KIND == "int8":
        y = y * tl.load(_field(segments, s, 1).to(tl.pointer_type(tl.float32)) + absolute, mask=alive, other=0.0)[:, None]
    bias = _field(segments, s, 5)
    if bias != 0:
        y += tl.load(bias.to(tl.pointer_type(HALF)) + absolute, mask=alive, other=0.0).to(tl.float32)[:, None]
    for r0 in tl.static_range(0, RANK, 16):
        r = r0 + tl.arange(0, 16)
        b = tl.load(_field(segments, s, 6).to(tl.pointer_type(HALF)) + absolute[:, None] * RANK + r[None, :], mask=alive[:, None],
                    other=0.0).to(tl.float32)  # fmt: skip
        ax = tl.zeros((8, 16), tl.float32)
        for i in tl.static_range(SLICES):
            at = (i * 16 + m[:, None]) * A_ROWS + _field(segments, s, 11) + r[None, :]
            ax += tl.load(xa + at, mask=(m < M)[:, None], other=0.0, cache_modifier=".cg")
        y += tl.sum(b[:, None, :] * ax[None, :, :], 2)
    return y


@triton.jit
def _low_rank(
    a, xa, counters, pid, x, x_stride, M, K64, A_ROWS,
    COLUMNS: tl.constexpr, SLICES: tl.constexpr, NT: tl.constexpr, WARPS: tl.constexpr, HALF: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of A by one slice of the columns, for all rows of x; then the counter."""
    tid = tl.arange(0, WARPS * 32)
    row = pid // SLICES * 16
    part = pid % SLICES
    per = tl.cdiv(K64, SLICES)
    g_row = row + tid % 32 // 4
    alive = tid >= 0
    zero = (tl.zeros((WARPS * 32,), tl.float32),) * 4
    acc = _columns(
        (zero,) * NT, (a.to(tl.pointer_type(tl.uint64)),), (g_row, g_row + 8), (alive, alive), a, (0,), a, x, x_stride, M, K64,
        part * per, tl.minimum(part * per + per, K64), tid, a,
        tl.cdiv(COLUMNS, SLICES * 256 * WARPS), "dense", False, 1, "none", 1, NT, WARPS, HALF, INTERPRETED,
    )  # fmt: skip
    for n in tl.static_range(NT):
        m = 8 * n + tl.arange(0, 8)
        at = (part * 16 + m[None, :]) * A_ROWS + row + tl.arange(0, 16)[:, None]
        tl.store(xa + at, _sums(acc[n], WARPS), mask=(m < M)[None, :])
    tl.debug_barrier()
    tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["M", "A_ROWS", "a_programs"])
def _gemv(
    out, x, add, segments, pairs, nested_levels, a, xa, counters,
    M, K64, x_stride, out_stride, add_stride, multiplier, A_ROWS, a_programs,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, SEGMENTS: tl.constexpr,
    PAIRED: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, RANK: tl.constexpr, SLICES: tl.constexpr, RT: tl.constexpr,
    NT: tl.constexpr, WARPS: tl.constexpr, HALF: tl.constexpr, TABLE: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
    PREFETCHED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = add + multiplier * (x W^T + bias + B (A x)), or act(first) * second of two segments' outputs (PAIRED)."""
    tid = tl.arange(0, WARPS * 32)
    base = tid
    pid, epoch = tl.program_id(0).to(tl.int64), 0
    if RANK > 0:
        ticket = tl.atomic_add(counters, 1)
        pid, epoch = ticket % tl.num_programs(0), ticket // tl.num_programs(0)
    if PDL:
        cuda.gdc_launch_dependents()
    if pid < a_programs:
        if PDL:
            cuda.gdc_wait()
        _low_rank(a, xa, counters, pid, x, x_stride, M, K64, A_ROWS, COLUMNS, SLICES, NT, WARPS, HALF, INTERPRETED)
    else:
        tile = pid - a_programs
        s = 0
        for i in tl.static_range(1, 1 if PAIRED else SEGMENTS):
            s += (tile >= _field(segments, i, 10)).to(tl.int32)
        row = (tile - _field(segments, s, 10)) * (16 if PAIRED else 16 * RT)
        codes, rows, alive, numbers = (), (), (), ()
        for f in tl.static_range(RT):
            sf = f if PAIRED else s
            mine = (row if PAIRED else row + 16 * f) + tid % 32 // 4
            first = _field(segments, sf, 7)
            limit = _field(segments, sf, 8)
            address = _field(segments, sf, 0)
            if PREFETCHED and (PAIRED or f == 0):
                count = tl.minimum(limit - row, 16 if PAIRED else 16 * RT).to(tl.int32) * (K64 * 8 * BITS)
                tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [address + (first + row) * (K64 * 8 * BITS), count], dtype=tl.int32,
                                          is_pure=False, pack=1)  # fmt: skip
            codes = codes + (address.to(tl.pointer_type(tl.uint64)),)
            rows = rows + (first + mine, first + mine + 8)
            alive = alive + (mine < limit, mine + 8 < limit)
            numbers = numbers + (sf,)
        if (KIND != "dense") and (not INTERPRETED):
            start = tl.inline_asm_elementwise(TABLE, "=&r,l", [pairs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
            base = start + tid % 32 * 4
        if PDL:
            cuda.gdc_wait()
        zero = (tl.zeros((WARPS * 32,), tl.float32),) * 4
        acc = _columns(
            (zero,) * (RT * NT), codes, rows, alive, segments, numbers, nested_levels, x, x_stride, M, K64, 0, K64, base, pairs,
            tl.cdiv(COLUMNS, 256 * WARPS), KIND, NESTED, PER, ZERO, RT, NT, WARPS, HALF, INTERPRETED,
        )  # fmt: skip
        if RANK > 0:
            while tl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu") < (epoch + 1) * a_programs:
                pass
        for n in tl.static_range(NT):
            m = 8 * n + tl.arange(0, 8)
            for f in tl.static_range(1 if PAIRED else RT):
                y = _sums(acc[NT * f + n], WARPS)
                here = row if PAIRED else row + 16 * f
                y = _finished(y, segments, s, here, n, M, xa, A_ROWS, KIND, RANK, SLICES, HALF)
                if PAIRED:
                    z = _finished(_sums(acc[NT + n], WARPS), segments, 1, here, n, M, xa, A_ROWS, KIND, RANK, SLICES, HALF)
                    y = _activated(y, ACT) * z
                elif ACT != "none":
                    y = _activated(y, ACT)
                r = here + tl.arange(0, 16)
                column = _field(segments, s, 9) + r[:, None]
                mask = (r < _field(segments, s, 8))[:, None] & (m < M)[None, :]
                y = y * multiplier
                if ADD:
                    y += tl.load(add + m[None, :] * add_stride + column, mask=mask, other=0.0).to(tl.float32)
                tl.store(out + m[None, :] * out_stride + column, to_dtype(y, out.dtype.element_ty, INTERPRETED), mask=mask)
