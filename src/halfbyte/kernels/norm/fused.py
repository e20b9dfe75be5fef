"""The Triton twin: rows in registers, every byte read once and written once.

A program holds a few whole rows, so that statistics need no second pass and backward may write over what it read. Columns
are one run of neighbours: 16 bytes a thread and access where strides allow. Offsets of rows are int64.

Letters: T tokens, H hidden.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.norm.reference import NormSpec

Tile = tuple[int, int]
"""Rows of a program, and its warps."""


@triton.jit
def _factor(weight, column, within, OFFSET: tl.constexpr):
    """fp32 `[1, BLOCK]`."""
    return tl.load(weight + column, mask=within, other=0.0).to(tl.float32) + OFFSET


@triton.jit(do_not_specialize=["T"])
def _add_norm(
    x, delta, residual, out, rstd, mean, weight, bias, x_stride, delta_stride, out_stride, T, eps,
    OFFSET: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """delta, mean, weight, bias: None where there is none. residual is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    within = column < H
    inside = row < T
    if H != BLOCK:
        inside = inside & within
    r = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if delta is not None:
        d = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0)
        r = to_dtype(r.to(tl.float32) + d.to(tl.float32), x.dtype.element_ty, INTERPRETED)
        tl.store(residual + row * H + column, r, mask=inside)
    y = r.to(tl.float32)
    if mean is not None:
        m = tl.sum(y, axis=1, keep_dims=True) / H
        tl.store(mean + row, m, mask=row < T)
        y = tl.where(inside, y - m, 0.0)
    inverse = tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) / H + eps)
    tl.store(rstd + row, inverse, mask=row < T)
    y = y * inverse
    if weight is not None:
        y = y * _factor(weight, column, within, OFFSET)
    if bias is not None:
        y = y + tl.load(bias + column, mask=within, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, to_dtype(y, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _norm_backward(
    d_out, residual, rstd, mean, weight, add, out, d_stride, residual_stride, add_stride, out_stride, T,
    OFFSET: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`out` may be `d_out` or `add`: all of a row is in registers before any of it is written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    within = column < H
    inside = row < T
    if H != BLOCK:
        inside = inside & within
    unit = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(d_out + row * d_stride + column, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        stream = tl.load(add + row * add_stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(rstd + row, mask=row < T, other=0.0)
    if mean is not None:
        unit = unit - tl.load(mean + row, mask=row < T, other=0.0)
    unit = unit * inverse
    if weight is not None:
        g = g * _factor(weight, column, within, OFFSET)
    # Beyond H g is zero, so what unit is there does not count.
    d = g - unit * (tl.sum(g * unit, axis=1, keep_dims=True) / H)
    if mean is not None:
        d = d - tl.sum(g, axis=1, keep_dims=True) / H
    d = d * inverse
    if add is not None:
        d = d + stream
    tl.store(out + row * out_stride + column, to_dtype(d, out.dtype.element_ty, INTERPRETED), mask=inside)


@functools.cache
def tile_of(width: int) -> Tile:
    """About 32 elements a thread: enough bytes on the way to keep memory busy, few enough registers for several programs a core."""
    block = 1 << (width - 1).bit_length()
    rows = max(2048 // block, 1)
    return rows, min(max(rows * block // 1024, 1), 16)


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    spec: NormSpec,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `halfbyte.kernels.norm.add_norm`. tile: measured otherwise."""
    length, width = x.shape
    rows, warps = tile or tile_of(width)
    residual = x if delta is None else torch.empty((length, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty(length, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if spec.kind == "layer" else None
    if length:
        _add_norm[(-(-length // rows),)](
            x, delta, None if delta is None else residual, out, rstd, mean, weight, bias,
            x.stride(0), 0 if delta is None else delta.stride(0), out.stride(0), length, spec.eps,
            spec.offset, width, 1 << (width - 1).bit_length(), rows, INTERPRETED, num_warps=warps,
        )  # fmt: skip
    return residual, rstd, mean


def norm_backward(
    d_out: Tensor,
    residual: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    spec: NormSpec,
    weight: Tensor | None,
    add: Tensor | None,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """See `halfbyte.kernels.norm.norm_backward`. tile: measured otherwise."""
    length, width = residual.shape
    rows, warps = tile or tile_of(width)
    if length:
        _norm_backward[(-(-length // rows),)](
            d_out, residual, rstd, mean, weight, add, out,
            d_out.stride(0), residual.stride(0), 0 if add is None else add.stride(0), out.stride(0), length,
            spec.offset, width, 1 << (width - 1).bit_length(), rows, INTERPRETED, num_warps=warps,
        )  # fmt: skip
