"""A x of a group's adapters, in a launch of its own: where no launch in front has made it."""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit(do_not_specialize=["M"])
def _low_rank(
    x, a, xa, M, K, x_stride,
    A_ROWS: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """xa `[M, A_ROWS]` = x A^T, fp32; TALL rows of A a program."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    r, m, k = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.arange(0, ROWS), tl.arange(0, SPAN)
    acc = tl.zeros((TALL, ROWS, SPAN), tl.float32)
    start = 0
    while start < K:
        inside = start + k < K
        w = tl.load(a + r[:, None].to(tl.int64) * K + start + k[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        xs = tl.load(x + m[:, None] * x_stride + start + k[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        acc += w[:, None, :] * xs.to(tl.float32)[None, :, :]
        start += SPAN
    tl.store(xa + m[None, :] * A_ROWS + r[:, None], tl.sum(acc, 2), mask=(m < M)[None, :] & (r < A_ROWS)[:, None])
