"""The few instructions that Triton has no words for, as text; each has a plain twin for the interpreter, beside its call.

shared     a multiprocessor's shared memory: 256 pairs of levels, each 32 times, so that lane l finds every pair in bank l (look-ups
           never conflict with the neighbours'); the 256 levels of nested scales; sums of warps. Fills the tables; the address. The
           L2 cache keeps what they are filled from while weights stream through it.
lookup     four bytes of codes to four registers of two 16-bit levels each. A dot product of the four bytes with (0, 128, 0, 0) and
           the like is a byte's place in the table: with the load two instructions a pair.
mma        one tensor-core product of 16 rows by 16 columns of the weight by 8 rows of x.
quad       a value of one of the four lanes that share a row. flip: of the lane whose number differs by some bits.
words      8 or 16 bytes of a weight where a condition holds, read once: not kept in L1; the rest of their line comes into L2 along.
asked      no load from before it is issued after it. Left alone, the assembler gathers all loads of a tile behind its last product,
           where registers are plenty, and every warp then waits for memory.
x words    16 bytes of x where a condition holds, else zeros: kept in L1, since other tiles read them again.
put, get   a number into shared memory where a condition holds, and out of it.
prefetch   a run of bytes into the L2 cache, by the copy engine: no register waits for it.
"""

from __future__ import annotations

import functools

TABLE_BYTES = 32768
LEVELS_BYTES = 1024
TRITON_BYTES = 4096
"""Shared memory left to what Triton itself moves between threads. Together they stay within 48 KiB: for more, a launch needs a
permission that Triton only asks for when its own part is that large."""
STATIC_BYTES = 49152 - TRITON_BYTES
LOOKUP = (
    "{ .reg .b32 p, q, r, s; "
    + " ".join(f"dp4a.u32.u32 {v}, $4, {0x80 << 8 * i:#x}, $5; ld.shared.b32 ${i}, [{v}];" for i, v in enumerate("pqrs"))
    + " }"
)
MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
MMA_FP16 = MMA_BF16.replace("bf16", "f16")
QUAD = "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;"
FLIP = "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
MERGE = "prmt.b32 $0, $1, $2, 0x7610;"
TWO_WORDS = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p ld.global.L1::no_allocate.L2::128B.v2.b32 {$0,$1}, [$2]; }"
FOUR_WORDS = "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p ld.global.L1::no_allocate.L2::128B.v4.b32 {$0,$1,$2,$3}, [$4]; }"
ASKED = "bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
X_WORDS = (
    "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
    "@p ld.global.v4.b32 {$0,$1,$2,$3}, [$4]; }"
)
PUT = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.u32 $0, 0; }"
GET = "ld.shared.f32 $0, [$1];"
PREFETCH = (
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
    "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
)


def sums_at(kind: str) -> int:
    """Where in shared memory the sums of warps start, in bytes: behind the tables, where there are any."""
    return 0 if kind == "dense" else TABLE_BYTES + LEVELS_BYTES


@functools.cache
def shared(kind: str, nested: bool, threads: int) -> str:
    """Declares the shared memory and fills its tables (no barrier). `$1`, `$2`: addresses of the pairs and the nested levels."""
    body = []
    if kind != "dense":
        body += [
            f"shr.u32 e, c, 3; mul.wide.u32 o, e, 4; add.u64 o, o, $1; ld.global.nc.L2::cache_hint.b32 v, [o], k; "
            f"shl.b32 e, c, 4; add.u32 e, e, $0; st.shared.v4.b32 [e], {{v, v, v, v}}; add.u32 c, c, {threads};"
            for _ in range(TABLE_BYTES // 16 // threads)
        ]
    if nested:
        body.append("mov.u32 c, %tid.x;")
        body += [
            f"setp.lt.u32 p, c, 256; mul.wide.u32 o, c, 4; add.u64 o, o, $2; @p ld.global.nc.L2::cache_hint.b32 v, [o], k; "
            f"shl.b32 e, c, 2; add.u32 e, e, $0; @p st.shared.b32 [e+{TABLE_BYTES}], v; add.u32 c, c, {threads};"
            for _ in range(-(-256 // threads))
        ]
    return (
        f".shared .align 128 .b8 halfbyte_shared[{STATIC_BYTES}]; {{ .reg .b32 c, e, v; .reg .b64 o, k; .reg .pred p; "
        "createpolicy.fractional.L2::evict_last.b64 k, 1.0; "
        "mov.u32 $0, halfbyte_shared; mov.u32 c, %tid.x; " + " ".join(body) + " }"
    )
