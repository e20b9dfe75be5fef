"""The other CUDA way: a GEMM of ours writes the logits and, from its accumulators, what the softmax needs of each tile.

Why: the vendor's GEMM cannot gather maxima and sums, so the kernel after it reads a chunk of logits twice. Here a tile of logits
leaves, beside its rounded numbers, two fp32 numbers a row (maximum, sum of exponentials); the gradient kernel then reads logits
once, and rows need not fit a cache. Deterministic: a tile is summed by one program, and tiles are combined in order.
Cost: as `fused`, and 8 bytes a row and tile. It wins where our GEMM is nearer to the vendor's than a chip's memory is to its cache.

Letters: n = rows of the chunk, H = hidden size, V = vocabulary, M, N, K = the tile's sides.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.cross_entropy.parts import Task
from halfbyte.kernels.cross_entropy.softmax import LOWEST, gradient_of, logits_of
from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype

log = logging.getLogger("halfbyte")


@dataclass(frozen=True)
class Tile:
    """Sides of a GEMM's tile, its warps and the depth of its loads."""

    m: int = 128
    n: int = 256
    k: int = 64
    warps: int = 8
    stages: int = 4


TILE = Tile()
SHALLOW = Tile(stages=3)
DEEP = 147_456
"""Bytes of shared memory that `TILE` takes on sm_80; on sm_90 and sm_100 it takes more, and there is more. Cards of sm_86, sm_89
and sm_120 have 101,376 a block, of which `SHALLOW` takes 98,304."""
SPAN = 8192
"""Logits a program of the gradient kernel turns."""


@triton.jit
def _logits(
    h, w, z, tops, sums, plain_sums, bias, rows, stride_h, stride_w, stride_z, tiles, scale, cap,
    V: tl.constexpr, H: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SMOOTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of z = h Wᵀ, with the maximum and the sum of exponentials of each of its rows (of the numbers as stored)."""
    program = tl.program_id(0)
    high = tl.cdiv(rows, M)
    column = program // high
    first_m = (program % high) * M
    m = first_m + tl.arange(0, M)
    n = column * N + tl.arange(0, N)
    k = tl.arange(0, K)
    # Rows and columns beyond the edges read the last one: no mask in the loop, and what they give is not stored.
    h += tl.minimum(m, rows - 1).to(tl.int64)[:, None] * stride_h + k[None, :]
    w += tl.minimum(n, V - 1).to(tl.int64)[None, :] * stride_w + k[:, None]
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, H, K):
        if H % K == 0:
            a, b = tl.load(h), tl.load(w)
        else:
            a = tl.load(h, mask=k[None, :] < H - start, other=0.0)
            b = tl.load(w, mask=k[:, None] < H - start, other=0.0)
        if INTERPRETED:  # its products of bf16 are not of numbers (3.6)
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total)
        h += K
        w += K
    stored = to_dtype(total, z.dtype.element_ty, INTERPRETED)
    tl.store(z + m.to(tl.int64)[:, None] * stride_z + n[None, :], stored, mask=(m < rows)[:, None] & (n < stride_z)[None, :])
    x = logits_of(stored, bias, n[None, :], V, scale, cap, BIAS, SCALED, CAPPED)
    top = tl.maximum(tl.max(x, 1), LOWEST)
    at = m.to(tl.int64) * tiles + column
    tl.store(tops + at, top, mask=m < rows)
    tl.store(sums + at, tl.sum(tl.exp(x - top[:, None]), 1), mask=m < rows)
    if SMOOTH:
        tl.store(plain_sums + at, tl.sum(tl.where((n < V)[None, :], x, 0.0), 1), mask=m < rows)


@triton.jit
def _combine(
    z, tops, sums, plain_sums, targets, losses, hits, factors, bias, stride_z, rows, scale, cap, smoothing, zeta,
    TILES: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr, SQUARED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One row's tiles: its loss, its hit, and what the gradient needs: the largest logit and a factor."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    t = tl.arange(0, WIDE)
    at = row * TILES + t
    top = tl.load(tops + at, mask=t < TILES, other=LOWEST)
    largest = tl.max(top, 0)
    whole = tl.sum(tl.load(sums + at, mask=t < TILES, other=0.0) * tl.exp(top - largest), 0)
    # The first of equal logits is the prediction: those before the target in its tile are looked at again.
    home = (target // N).to(tl.int32)
    k = home * N + tl.arange(0, N)
    stored = tl.load(z + row * stride_z + k, mask=(k >= 0) & (k < stride_z), other=0.0)
    x = logits_of(stored, bias, k, V, scale, cap, BIAS, SCALED, CAPPED)
    at_target = tl.max(tl.where(k == target, x, float("-inf")), 0)
    earlier = tl.maximum(tl.max(tl.where(k < target, x, float("-inf")), 0), tl.max(tl.where(t < home, top, LOWEST), 0))
    log_sum = tl.log(whole) + largest
    loss = log_sum - at_target
    factor = 1.0 / whole
    if SMOOTH:
        loss += smoothing * (at_target - tl.sum(tl.load(plain_sums + at, mask=t < TILES, other=0.0), 0) / V)
    if SQUARED:
        loss += zeta * log_sum * log_sum
        factor *= 1.0 + 2.0 * zeta * log_sum
    tl.store(losses + row, loss)
    tl.store(hits + row, ((at_target >= largest) & (earlier < at_target)).to(tl.int32))
    tl.store(factors + row, largest)
    tl.store(factors + rows + row, factor)


@triton.jit
def _gradient(
    z, d, targets, factors, bias, stride_z, stride_d, rows, scale, cap, smoothing,
    V: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr,
    SPAN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """SPAN logits of one row into their gradient."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    stored = tl.load(z + row * stride_z + k, mask=k < stride_z, other=0.0)
    x = logits_of(stored, bias, k, V, scale, cap, BIAS, SCALED, CAPPED)
    largest, factor = tl.load(factors + row), tl.load(factors + rows + row)
    g = gradient_of(x, k, tl.load(targets + row), largest, factor, V, scale, cap, smoothing, SCALED, CAPPED, SMOOTH)
    tl.store(d + row * stride_d + k, to_dtype(g, d.dtype.element_ty, INTERPRETED), mask=k < stride_d)


def fitting(shared: int) -> Tile:
    """The tile for a GPU with so many bytes of shared memory a block."""
    return TILE if shared >= DEEP else SHALLOW


@functools.cache
def tile_of(device: torch.device) -> Tile:
    """The tile that runs on `device`; one of fewer stages is told, once."""
    if device.type != "cuda":
        return TILE
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stub
    tile = fitting(shared)
    if tile != TILE:
        log.info("loss: tiled loads %d tiles ahead, not %d (%d KiB of shared memory)", tile.stages, TILE.stages, shared >> 10)
    return tile


def chunk(
    h: Tensor,
    weight: Tensor,
    z: Tensor,
    d: Tensor | None,
    target: Tensor,
    losses: Tensor,
    hits: Tensor,
    task: Task,
    tile: Tile | None = None,
) -> None:
    """Losses fp32 `[c]` and hits int32 `[c]` of hidden rows h `[c, H]`; z `[c, V]` (aligned rows) receives the products, and d,
    which may be z, their gradient. tile: the one that fits the device, unless given."""
    tile = tile or tile_of(h.device)
    head, extras, (rows, vocabulary) = task.head, task.extras, z.shape
    bias = z if head.bias is None else head.bias
    kind = {"V": vocabulary, "BIAS": head.bias is not None, "SCALED": head.scale != 1.0, "CAPPED": head.cap != 0.0}
    smooth, cap = extras.smoothing != 0.0, head.cap or 1.0
    tiles = triton.cdiv(vocabulary, tile.n)
    partial = torch.empty(2 + smooth, rows, tiles, dtype=torch.float32, device=h.device)
    factors = torch.empty(2, rows, dtype=torch.float32, device=h.device)
    _logits[(triton.cdiv(rows, tile.m) * tiles,)](
        h, weight, z, partial[0], partial[1], partial[-1], bias, rows, h.stride(0), weight.stride(0), z.stride(0), tiles,
        head.scale, cap, H=h.shape[1], M=tile.m, N=tile.n, K=tile.k, SMOOTH=smooth, INTERPRETED=INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages, **kind,
    )  # fmt: skip
    _combine[(rows,)](
        z, partial[0], partial[1], partial[-1], target, losses, hits, factors, bias, z.stride(0), rows,
        head.scale, cap, float(extras.smoothing), float(extras.z), TILES=tiles, WIDE=triton.next_power_of_2(tiles),
        SMOOTH=smooth, SQUARED=extras.z != 0.0, N=tile.n, **kind,
    )  # fmt: skip
    if d is not None:
        span = min(SPAN, triton.next_power_of_2(vocabulary))
        _gradient[(rows, triton.cdiv(vocabulary, span))](
            z, d, target, factors, bias, z.stride(0), d.stride(0), rows, head.scale, cap, float(extras.smoothing),
            SMOOTH=smooth, SPAN=span, INTERPRETED=INTERPRETED, num_warps=8, **kind,
        )  # fmt: skip
