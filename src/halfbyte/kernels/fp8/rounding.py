"""Rounding to e4m3 inside Triton kernels: one instruction on the GPU, the same arithmetic on bits in the interpreter.

`cvt.rn.satfinite.e4m3x2.f32` (sm_89 and newer) rounds two fp32 to nearest, ties to even, and saturates; Triton's own cast goes
through fp16 on some GPUs, which would round twice.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

FOUR = tl.constexpr(
    """{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}"""
)


@triton.jit
def nearest(x):
    """fp32 to the nearest e4m3 number, as fp32, saturating at +-448. For finite x."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    # Below 2^-6 e4m3 is evenly spaced by 2^-9, which is what is left of a number after adding 1.5 * 2^14.
    small = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) >= 0.015625, normal, small)


@triton.jit
def rest(x):
    """What rounding takes from x, +0 where it is nothing."""
    return tl.minimum(tl.maximum(x, -448.0), 448.0) - nearest(x) + 0.0


@triton.jit
def to_bits(x, INTERPRETED: tl.constexpr):
    """fp32 to the byte of its nearest e4m3 number; NaN to NaN."""
    if INTERPRETED:
        near = nearest(x)
        bits = near.to(tl.uint32, bitcast=True)
        normal = ((bits & 0x7FFFFFFF) >> 20).to(tl.int32) - 960
        magnitude = tl.where(tl.abs(near) >= 0.015625, normal, (tl.abs(near) * 512.0).to(tl.int32))
        sign = (x.to(tl.uint32, bitcast=True) >> 31).to(tl.int32) * 128
        return tl.where(x != x, 127, magnitude + sign).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(FOUR, "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4)
