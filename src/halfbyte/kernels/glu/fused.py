"""The Triton twin: a run of one row a program, 16 bytes a thread and access where strides allow; offsets of rows are int64.

Letters: T tokens, F features.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.glu.reference import CUBIC, ROOT_2_OVER_PI, Activation

Tile = tuple[int, int]
"""Features of a program, and its warps."""


@triton.jit
def _sigmoid(x):
    """(s, s (1 - s)) of s = 1 / (1 + exp(-x)): one exponential, nothing overflows and nothing cancels."""
    e = tl.exp(-tl.abs(x))
    p = 1.0 / (1.0 + e)
    return tl.where(x >= 0, p, e * p), e * p * p


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """act(x) and act'(x) in fp32. tanh(u) = 2 sigmoid(2u) - 1 turns the tanh form of GELU into x sigmoid(2u)."""
    if ACTIVATION == "silu":
        s, both = _sigmoid(x)
        value, slope = x * s, s + x * both
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value, slope = x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        s, both = _sigmoid(2.0 * K * (x + C * x * x * x))
        value, slope = x * s, s + x * both * (2.0 * K) * (1.0 + 3.0 * C * x * x)
    elif ACTIVATION == "relu":
        value, slope = tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        value, slope = tl.maximum(x, 0.0) * tl.maximum(x, 0.0), 2.0 * tl.maximum(x, 0.0)
    return value, slope


@triton.jit
def _glu(
    gate, up, out, gate_stride, up_stride, out_stride,
    ACTIVATION: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """up: None without it."""
    program = tl.program_id(0)
    row = (program // TILES).to(tl.int64)
    column = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    if up is not None:
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(g, ACTIVATION, K, C)
    if up is not None:
        value = value * u
    tl.store(out + row * out_stride + column, to_dtype(value, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _glu_backward(
    dh, gate, up, dh_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """In place; up: None without it."""
    program = tl.program_id(0)
    row = (program // TILES).to(tl.int64)
    column = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    dtype: tl.constexpr = dh.dtype.element_ty
    d_at, gate_at = dh + row * dh_stride + column, gate + row * gate_stride + column
    d = tl.load(d_at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    if up is not None:
        up_at = up + row * up_stride + column
        u = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(g, ACTIVATION, K, C)
    if up is not None:
        tl.store(up_at, to_dtype(d * value, dtype, INTERPRETED), mask=inside)
        value = value * u
        slope = slope * u
    tl.store(d_at, to_dtype(value, dtype, INTERPRETED), mask=inside)
    tl.store(gate_at, to_dtype(d * slope, dtype, INTERPRETED), mask=inside)


@functools.cache
def tile_of(width: int) -> Tile:
    """A run of 1,024 (8 elements a thread), or 2,048 where that divides F: fewer programs of the same shape."""
    block = min(1 << (width - 1).bit_length(), 2048 if width % 2048 == 0 else 1024)
    return block, max(block // 256, 1)


def glu(gate: Tensor, up: Tensor | None, activation: Activation, out: Tensor, tile: Tile | None = None) -> None:
    """See `halfbyte.kernels.glu.glu`. tile: measured otherwise."""
    length, width = gate.shape
    block, warps = tile or tile_of(width)
    tiles = -(-width // block)
    if length:
        _glu[(length * tiles,)](
            gate, up, out, gate.stride(0), 0 if up is None else up.stride(0), out.stride(0),
            activation, ROOT_2_OVER_PI, CUBIC, width, tiles, block, INTERPRETED, num_warps=warps,
        )  # fmt: skip


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, activation: Activation, tile: Tile | None = None) -> None:
    """See `halfbyte.kernels.glu.glu_backward`. tile: measured otherwise."""
    length, width = gate.shape
    block, warps = tile or tile_of(width)
    tiles = -(-width // block)
    if length:
        _glu_backward[(length * tiles,)](
            dh, gate, up, dh.stride(0), gate.stride(0), 0 if up is None else up.stride(0),
            activation, ROOT_2_OVER_PI, CUBIC, width, tiles, block, INTERPRETED, num_warps=warps,
        )  # fmt: skip
