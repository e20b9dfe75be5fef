"""Elementwise kernels of a layer that write their result in e4m3 as well: the pass that would only quantise falls away.

The same numbers as `kernels.norm` and `kernels.glu` followed by `quantize_rows`: what is quantised is the result as it is stored.
The scale of a row is known at its end. A norm holds the row (rows beyond `LONGEST` take the two steps). A GLU has longer rows of
three operands: held, they leave room for one program a multiprocessor, which then loads, computes and stores by turns; so it goes
through the row in short runs, and reads again what it stored, from cache.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.fp8.fused import quantize_rows
from halfbyte.kernels.fp8.parts import LARGEST, TINY, Rows
from halfbyte.kernels.fp8.rounding import to_bits
from halfbyte.kernels.glu.fused import Tile, _value_and_slope
from halfbyte.kernels.glu.reference import CUBIC, ROOT_2_OVER_PI, Activation
from halfbyte.kernels.norm import fused as norm_kernels
from halfbyte.kernels.norm.reference import NormSpec

LONGEST = 16384
"""Features of a norm whose rows stay in registers."""
RUN, RUN_BACK = (2048, 8), (4096, 8)
"""Features of a GLU that a program takes at a time and its warps, as measured on an H200: forward, backward."""
NUMBERS = {"LARGEST": LARGEST, "TINY": TINY, "INTERPRETED": INTERPRETED}


@triton.jit
def _write(out8, scale, row, column, y, inside, top, out8_stride, LARGEST: tl.constexpr, INTERPRETED: tl.constexpr):
    """y (as it was stored) in e4m3, with the scale that its row's largest number top gives."""
    tl.store(scale + row, top * (1.0 / LARGEST))
    tl.store(out8 + row * out8_stride + column, to_bits(y * tl.div_rn(LARGEST, top), INTERPRETED), mask=inside)


@triton.jit
def _add_norm(
    x, delta, residual, out, rstd, mean, weight, bias, out8, scale, x_stride, delta_stride, out_stride, out8_stride, eps, offset,
    H: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A row a program. delta, mean, weight, bias: None where there is none."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    r = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if delta is not None:
        d = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0)
        r = to_dtype(r.to(tl.float32) + d.to(tl.float32), x.dtype.element_ty, INTERPRETED)
        tl.store(residual + row * H + column, r, mask=inside)
    y = r.to(tl.float32)
    if mean is not None:
        m = tl.sum(y, axis=0) / H
        tl.store(mean + row, m)
        y = tl.where(inside, y - m, 0.0)
    inverse = tl.rsqrt(tl.sum(y * y, axis=0) / H + eps)
    tl.store(rstd + row, inverse)
    y = y * inverse
    if weight is not None:
        y = y * (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset)
    if bias is not None:
        y = y + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    stored = to_dtype(y, out.dtype.element_ty, INTERPRETED)
    tl.store(out + row * out_stride + column, stored, mask=inside)
    y = tl.where(inside, stored.to(tl.float32), 0.0)
    _write(out8, scale, row, column, y, inside, tl.maximum(tl.max(tl.abs(y), 0), TINY), out8_stride, LARGEST, INTERPRETED)


@triton.jit
def _again(x, out8, column, F, inverse, INTERPRETED: tl.constexpr):
    """A run of what this program stored in x, read again, in e4m3."""
    y = tl.load(x + column, mask=column < F, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(out8 + column, to_bits(y * inverse, INTERPRETED), mask=column < F)


@triton.jit
def _glu(
    gate, up, out, out8, scale, gate_stride, up_stride, out_stride, out8_stride,
    ACTIVATION: tl.constexpr, K: tl.constexpr, C: tl.constexpr, F: tl.constexpr, LOOPS: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A row a program, BLOCK features at a time, twice: what is stored, then the same in e4m3. up: None without it."""
    row = tl.program_id(0).to(tl.int64)
    gate += row * gate_stride
    out += row * out_stride
    tops = tl.zeros([BLOCK], tl.float32)
    for i in range(0, LOOPS):
        column = i * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(gate + column, mask=column < F, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if up is not None:
            at = up + row * up_stride + column
            u = tl.load(at, mask=column < F, other=0.0, eviction_policy="evict_first").to(tl.float32)
        value, _ = _value_and_slope(g, ACTIVATION, K, C)
        if up is not None:
            value = value * u
        stored = to_dtype(value, out.dtype.element_ty, INTERPRETED)
        tl.store(out + column, stored, mask=column < F)
        tops = tl.maximum(tops, tl.abs(stored.to(tl.float32)))
    top = tl.maximum(tl.max(tops, 0), TINY)
    tl.store(scale + row, top * (1.0 / LARGEST))
    inverse = tl.div_rn(LARGEST, top)
    tl.debug_barrier()
    for i in range(0, LOOPS):
        _again(out, out8 + row * out8_stride, i * BLOCK + tl.arange(0, BLOCK), F, inverse, INTERPRETED)


@triton.jit
def _glu_backward(
    dh, gate, up, out8, scale, dh_stride, gate_stride, up_stride, out8_stride,
    ACTIVATION: tl.constexpr, K: tl.constexpr, C: tl.constexpr, F: tl.constexpr, LOOPS: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """In place, as `_glu` goes; [d gate | d up] in e4m3 under one scale. up: None without it."""
    row = tl.program_id(0).to(tl.int64)
    dh += row * dh_stride
    gate += row * gate_stride
    out8 += row * out8_stride
    dtype: tl.constexpr = dh.dtype.element_ty
    tops = tl.zeros([BLOCK], tl.float32)
    for i in range(0, LOOPS):
        column = i * BLOCK + tl.arange(0, BLOCK)
        d = tl.load(dh + column, mask=column < F, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(gate + column, mask=column < F, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if up is not None:
            up_at = up + row * up_stride + column
            u = tl.load(up_at, mask=column < F, other=0.0, eviction_policy="evict_first").to(tl.float32)
        value, slope = _value_and_slope(g, ACTIVATION, K, C)
        if up is not None:
            d_up = to_dtype(d * value, dtype, INTERPRETED)
            tl.store(up_at, d_up, mask=column < F)
            tops = tl.maximum(tops, tl.abs(d_up.to(tl.float32)))
            value = value * u
            slope = slope * u
        tl.store(dh + column, to_dtype(value, dtype, INTERPRETED), mask=column < F, eviction_policy="evict_first")
        d_gate = to_dtype(d * slope, dtype, INTERPRETED)
        tl.store(gate + column, d_gate, mask=column < F)
        tops = tl.maximum(tops, tl.abs(d_gate.to(tl.float32)))
    top = tl.maximum(tl.max(tops, 0), TINY)
    tl.store(scale + row, top * (1.0 / LARGEST))
    inverse = tl.div_rn(LARGEST, top)
    # What other threads of this program stored is read from here on.
    tl.debug_barrier()
    for i in range(0, LOOPS):
        column = i * BLOCK + tl.arange(0, BLOCK)
        _again(gate, out8, column, F, inverse, INTERPRETED)
        if up is not None:
            _again(up + row * up_stride, out8 + F, column, F, inverse, INTERPRETED)


@triton.jit
def _norm_backward(
    d_out, residual, rstd, mean, weight, add, out, out8, scale, d_stride, residual_stride, add_stride, out_stride, out8_stride,
    offset, H: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A row a program. `out` may be `d_out` or `add`: all of a row is in registers before any of it is written."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    unit = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(d_out + row * d_stride + column, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        stream = tl.load(add + row * add_stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(rstd + row)
    if mean is not None:
        unit = unit - tl.load(mean + row)
    unit = unit * inverse
    if weight is not None:
        g = g * (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset)
    # Beyond H g is zero, so what unit is there does not count.
    d = g - unit * (tl.sum(g * unit, axis=0) / H)
    if mean is not None:
        d = d - tl.sum(g, axis=0) / H
    d = d * inverse
    if add is not None:
        d = d + stream
    stored = to_dtype(d, out.dtype.element_ty, INTERPRETED)
    tl.store(out + row * out_stride + column, stored, mask=inside)
    y = tl.where(inside, stored.to(tl.float32), 0.0)
    _write(out8, scale, row, column, y, inside, tl.maximum(tl.max(tl.abs(y), 0), TINY), out8_stride, LARGEST, INTERPRETED)


def _warps(block: int) -> int:
    return min(max(block // 1024, 1), 16)


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    spec: NormSpec,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    rows: Rows,
    warps: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`kernels.norm.add_norm`, with norm(residual) in `rows` too."""
    length, width = x.shape
    block = triton.next_power_of_2(width)
    if block > LONGEST or not length:
        found = norm_kernels.add_norm(x, delta, spec, weight, bias, out)
        quantize_rows(out, rows.main, rows.scale)
        return found
    residual = x if delta is None else torch.empty((length, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty(length, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if spec.kind == "layer" else None
    _add_norm[(length,)](
        x, delta, None if delta is None else residual, out, rstd, mean, weight, bias, rows.main.view(torch.uint8), rows.scale,
        x.stride(0), 0 if delta is None else delta.stride(0), out.stride(0), rows.main.stride(0), spec.eps, spec.offset,
        H=width, BLOCK=block, **NUMBERS, num_warps=warps or _warps(block),
    )  # fmt: skip
    return residual, rstd, mean


def _run(width: int, run: Tile) -> Tile:
    """Features at a time and warps: `run`, or less where a row is shorter."""
    most, warps = run
    block = min(max(triton.next_power_of_2(width), 16), most)
    return block, max(warps * block // most, 1)


def glu(gate: Tensor, up: Tensor | None, activation: Activation, out: Tensor, rows: Rows, run: Tile = RUN) -> None:
    """`kernels.glu.glu`, with h in `rows` too. run: features at a time and warps."""
    length, width = gate.shape
    block, warps = _run(width, run)
    if length:
        _glu[(length,)](
            gate, up, out, rows.main.view(torch.uint8), rows.scale, gate.stride(0), 0 if up is None else up.stride(0),
            out.stride(0), rows.main.stride(0), ACTIVATION=activation, K=ROOT_2_OVER_PI, C=CUBIC, F=width,
            LOOPS=triton.cdiv(width, block), BLOCK=block, **NUMBERS, num_warps=warps,
        )  # fmt: skip


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, activation: Activation, rows: Rows, run: Tile = RUN_BACK) -> None:
    """`kernels.glu.glu_backward`, with [d gate | d up] `[T, 2F]` in `rows` too; without `up`, d gate.

    run: features at a time and warps. gate and up lie behind each other, as the group of gate and up has its outputs.
    """
    length, width = gate.shape
    block, warps = _run(width, run)
    if length:
        _glu_backward[(length,)](
            dh, gate, up, rows.main.view(torch.uint8), rows.scale, dh.stride(0), gate.stride(0), 0 if up is None else up.stride(0),
            rows.main.stride(0), ACTIVATION=activation, K=ROOT_2_OVER_PI, C=CUBIC, F=width, LOOPS=triton.cdiv(width, block),
            BLOCK=block, **NUMBERS, num_warps=warps,
        )  # fmt: skip


def norm_backward(
    d_out: Tensor,
    residual: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    spec: NormSpec,
    weight: Tensor | None,
    add: Tensor | None,
    out: Tensor,
    rows: Rows,
    warps: int = 0,
) -> None:
    """`kernels.norm.norm_backward`, with `out` in `rows` too."""
    length, width = residual.shape
    block = triton.next_power_of_2(width)
    if block > LONGEST or not length:
        norm_kernels.norm_backward(d_out, residual, rstd, mean, spec, weight, add, out)
        quantize_rows(out, rows.main, rows.scale)
        return
    _norm_backward[(length,)](
        d_out, residual, rstd, mean, weight, add, out, rows.main.view(torch.uint8), rows.scale, d_out.stride(0), residual.stride(0),
        0 if add is None else add.stride(0), out.stride(0), rows.main.stride(0), spec.offset, H=width, BLOCK=block, **NUMBERS,
        num_warps=warps or _warps(block),
    )  # fmt: skip
