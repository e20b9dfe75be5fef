"""The few instructions that Triton has no words for, as text; each has a plain twin for the interpreter, beside its call.

table      fills 32 KiB of shared memory with 256 pairs of levels, each 32 times, so that lane l finds every pair in bank l: its
           look-ups never conflict with its neighbours'. Returns the table's address.
lookup     four bytes of codes to four registers of two 16-bit levels each: byte out, address, load: three instructions a pair.
mma        one tensor-core product of 16 rows by 16 columns of the weight by 8 rows of x.
quad       a value of one of the four lanes that share a row.
prefetch   a run of bytes into the L2 cache, by the copy engine: no register waits for it.
"""

from __future__ import annotations

import functools

TABLE_BYTES = 32768
LOOKUP = (
    "{ .reg .b32 p, q, r, s; "
    + " ".join(
        f"prmt.b32 {v}, $4, 0, {0x4440 + i:#x}; mad.lo.u32 {v}, {v}, 128, $5; ld.shared.b32 ${i}, [{v}];"
        for i, v in enumerate("pqrs")
    )
    + " }"
)
MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
MMA_FP16 = MMA_BF16.replace("bf16", "f16")
QUAD = "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;"
MERGE = "prmt.b32 $0, $1, $2, 0x7610;"
PREFETCH = (
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
    "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
)


@functools.cache
def table(threads: int) -> str:
    """Fill, then a barrier; `$1` is the address of the 256 pairs in global memory. The variable lives in the kernel's body."""
    pieces = TABLE_BYTES // 16 // threads
    body = [
        f"shr.u32 e, c, 3; mul.wide.u32 o, e, 4; add.u64 o, o, $1; ld.global.nc.b32 v, [o]; "
        f"shl.b32 e, c, 4; add.u32 e, e, $0; st.shared.v4.b32 [e], {{v, v, v, v}}; add.u32 c, c, {threads};"
        for _ in range(pieces)
    ]
    return (
        ".shared .align 128 .b8 halfbyte_levels[32768]; { .reg .b32 c, e, v; .reg .b64 o; mov.u32 $0, halfbyte_levels; "
        "mov.u32 c, %tid.x; " + " ".join(body) + " bar.sync 0; }"
    )
