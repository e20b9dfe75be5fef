"""A x of a group's adapters, in a launch of its own: where no launch in front has made it.

A product `[M, K]` by `[K, R]` is a few hundred KB: bound by how many reads follow each other. So the columns are cut, a program
reads its part of 16 rows of A and of x at once and multiplies on the tensor cores; of each 16 rows of A the program that ends last
adds the parts up, in one order.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit(do_not_specialize=["M"])
def _low_rank(
    x, a, xa, parts, counters, M, K, x_stride,
    A_ROWS: tl.constexpr, SPAN: tl.constexpr, CUTS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """xa `[M, A_ROWS]` = x A^T, fp32, by CUTS programs (WIDE as a power of two) for each 16 rows of A, SPAN columns each."""
    if PDL:
        cuda.gdc_launch_dependents()
    tile, cut = tl.program_id(0), tl.program_id(1)
    m, k = tl.arange(0, 16), cut * SPAN + tl.arange(0, SPAN)
    inside = (k < K)[None, :]
    r = tile * 16 + m
    # The weights are nobody's output: they are read before the wait.
    w = tl.load(a + r[:, None].to(tl.int64) * K + k[None, :], mask=(r < A_ROWS)[:, None] & inside, other=0.0)
    if PDL:
        cuda.gdc_wait()
    xs = tl.load(x + m[:, None] * x_stride + k[None, :], mask=(m < M)[:, None] & inside, other=0.0)
    if INTERPRETED:  # whose product (3.6) takes no bf16
        xs, w = xs.to(tl.float32), w.to(tl.float32)
    part = tl.dot(xs, tl.trans(w), input_precision="ieee")
    place = m[:, None] * 16 + m[None, :]
    tl.store(parts + (tile * CUTS + cut) * 256 + place, part)
    tl.debug_barrier()
    if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == CUTS - 1:
        tl.store(counters + tile, 0)
        c, i = tl.arange(0, WIDE)[:, None], tl.arange(0, 256)[None, :]
        of = tl.load(parts + (tile * CUTS + c) * 256 + i, mask=(c < CUTS) & (i < 256), other=0.0, cache_modifier=".cg")
        i = tl.arange(0, 256)
        tl.store(xa + i // 16 * A_ROWS + tile * 16 + i % 16, tl.sum(of, 0), mask=(i // 16 < M) & (tile * 16 + i % 16 < A_ROWS))
