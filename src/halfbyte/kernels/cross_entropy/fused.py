"""The CUDA twin: vendor GEMMs around one Triton kernel that turns a chunk of logits into its own gradient in place.

Why: at 8,192 labelled rows, 4,096 wide, and a vocabulary of 128,256 the two products are 17 TFLOP and the logits 2.1 GB; what is
neither of the two products is pure loss. So the logits of a chunk of rows are written once, in the compute dtype, into one buffer, and
the kernel reads them twice (the second time from the L2 cache: a program owns a row, so few rows are under way at a time) and
writes the gradient over them. Sums, exponentials and logarithms are fp32.
Cost: one buffer of logits (`chunk_bytes`), a chunk of gathered hidden rows, the gradient of the labelled rows. A packed head is decoded
in slices of the vocabulary, twice a chunk.

Letters: T = positions, n = labelled ones, H = hidden size, V = vocabulary.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.cross_entropy.parts import Head, Results, Task
from halfbyte.kernels.cross_entropy.slices import slices
from halfbyte.kernels.dequantize import decode
from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.gemm import matmul

ALIGNED = 64
"""Rows of logits start at multiples of this many numbers, whatever V is."""
LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LOWEST: tl.constexpr = tl.constexpr(-1.0e38)


@dataclass(frozen=True)
class Tuning:
    """Shape of the kernel. lanes x vec logits at a time by `warps` warps; keep: ask the cache to keep a row between its two readings; stages: of asynchronous loads."""

    lanes: int = 2048
    vec: int = 8
    warps: int = 16
    keep: bool = True
    stages: int = 1


TUNING = Tuning()


@triton.jit
def _tanh(x):
    """tanh by one exponential: never overflows, exact at both ends."""
    e = tl.exp2(-2.0 * LOG2E * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def _logits(x, bias, k, V: tl.constexpr, scale, cap, BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """Products as loaded -> logits in fp32; what is beyond the vocabulary is -inf."""
    x = x.to(tl.float32)
    if BIAS:
        x += tl.load(bias + k, mask=k < V, other=0.0).to(tl.float32)
    if SCALED:
        x *= scale
    if CAPPED:
        x = cap * _tanh(x / cap)
    return tl.where(k < V, x, float("-inf"))


@triton.jit
def _softmax(
    z, d, losses, hits, targets, bias, stride_z, stride_d, scale, cap, smoothing, zeta,
    V: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, SQUARED: tl.constexpr,
    GRAD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row of logits: loss, hit, and its gradient into d (which may be z). A thread keeps the maximum and the sum of its own
    lanes, so that threads meet once a row. Loads are bounded by the row's stride, which is aligned, not by V, which may be odd."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    d += row * stride_d
    target = tl.load(targets + row)
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    block: tl.constexpr = LANES * VEC
    KEPT: tl.constexpr = "evict_last" if KEEP else ""
    GONE: tl.constexpr = "evict_first" if KEEP else ""

    # The target's own logit, and the largest of those before it in its block: the first of equal logits is the prediction.
    home = (target // block * block).to(tl.int32)
    k = home + lane
    x = _logits(tl.load(z + k, mask=(k >= 0) & (k < stride_z), other=0.0), bias, k, V, scale, cap, BIAS, SCALED, CAPPED)
    at_target = tl.max(tl.max(tl.where(k == target, x, float("-inf")), 1), 0)
    earlier = tl.max(tl.max(tl.where(k < target, x, float("-inf")), 1), 0)

    top = tl.full([LANES], LOWEST, tl.float32)
    before = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    plain_sum = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, V, block, num_stages=STAGES):
        k = start + lane
        stored = tl.load(z + k, mask=k < stride_z, other=0.0, eviction_policy=KEPT)
        x = _logits(stored, bias, k, V, scale, cap, BIAS, SCALED, CAPPED)
        before = tl.where(start == home, top, before)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((x - higher[:, None]) * LOG2E), 1)
        top = higher
        if SMOOTH:
            plain_sum += tl.sum(tl.where(k < V, x, 0.0), 1)
    largest = tl.max(top, 0)
    whole = tl.sum(total * tl.exp2((top - largest) * LOG2E), 0)
    log_sum = tl.log(whole) + largest
    loss = log_sum - at_target
    if SMOOTH:
        loss += smoothing * (at_target - tl.sum(plain_sum, 0) / V)
    if SQUARED:
        loss += zeta * log_sum * log_sum
    tl.store(losses + row, loss)
    found = (at_target >= largest) & (earlier < at_target) & (tl.max(before, 0) < at_target)
    tl.store(hits + row, found.to(tl.int32))
    if GRAD:
        factor = 1.0 / whole
        if SQUARED:
            factor *= 1.0 + 2.0 * zeta * log_sum
        # Backwards: what was read last is the likeliest to be in the cache still.
        for done in tl.range(0, V, block, num_stages=STAGES):
            k = (V - 1) // block * block - done + lane
            stored = tl.load(z + k, mask=k < stride_z, other=0.0, eviction_policy=GONE)
            x = _logits(stored, bias, k, V, scale, cap, BIAS, SCALED, CAPPED)
            g = tl.exp2((x - largest) * LOG2E) * factor
            if SMOOTH:
                g -= smoothing / V
            g -= tl.where(k == target, 1.0 - smoothing, 0.0)
            if CAPPED:
                g *= 1.0 - (x / cap) * (x / cap)
            if SCALED:
                g *= scale
            g = tl.where(k < V, g, 0.0)
            tl.store(d + k, to_dtype(g, d.dtype.element_ty, INTERPRETED), mask=k < stride_d, eviction_policy=GONE)


@triton.jit
def _expand(out, compact, index, factor, H, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Row t of out: row index[t] of compact times the factor, zeros where the index is negative."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row).to(tl.int64)
    times = tl.load(factor)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(compact + source * H + k, mask=(k < H) & (source >= 0), other=0.0).to(tl.float32)
    tl.store(out + row * H + k, to_dtype(x * times, out.dtype.element_ty, INTERPRETED), mask=k < H)


def softmax_(
    z: Tensor, d: Tensor | None, target: Tensor, losses: Tensor, hits: Tensor, task: Task, tuning: Tuning = TUNING
) -> None:
    """Losses fp32 `[c]` and hits int32 `[c]` of products z `[c, V]` in rows of an aligned stride; d: their gradient, may be z."""
    head, extras, (rows, vocabulary) = task.head, task.extras, z.shape
    lanes = min(tuning.lanes, triton.next_power_of_2(triton.cdiv(vocabulary, tuning.vec)))
    _softmax[(rows,)](
        z, z if d is None else d, losses, hits, target, z if head.bias is None else head.bias,
        z.stride(0), z.stride(0) if d is None else d.stride(0),
        head.scale, head.cap or 1.0, float(extras.smoothing), float(extras.z),
        V=vocabulary, BIAS=head.bias is not None, SCALED=head.scale != 1.0, CAPPED=head.cap != 0.0,
        SMOOTH=extras.smoothing != 0.0, SQUARED=extras.z != 0.0, GRAD=d is not None,
        LANES=lanes, VEC=tuning.vec, KEEP=tuning.keep, STAGES=tuning.stages, INTERPRETED=INTERPRETED,
        num_warps=min(tuning.warps, max(lanes // 32, 1)),
    )  # fmt: skip


def expand(compact: Tensor, labels_kept: Tensor, factor: Tensor) -> Tensor:
    """A gradient `[n, H]` of the labelled rows as one of all rows `[T, H]`, times a scalar fp32 tensor. labels_kept: bool `[T]`."""
    out = compact.new_empty(len(labels_kept), compact.shape[1])
    if out.numel():
        index = torch.where(labels_kept, labels_kept.cumsum(0, dtype=torch.int32) - 1, -1)
        block = min(triton.next_power_of_2(out.shape[1]), 4096)
        _expand[(len(out), triton.cdiv(out.shape[1], block))](
            out, compact, index, factor, out.shape[1], BLOCK=block, INTERPRETED=INTERPRETED
        )
    return out


def _padded(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty `[rows, columns]` whose rows start at aligned addresses."""
    width = -(-columns // ALIGNED) * ALIGNED
    return torch.empty(rows, width, dtype=dtype, device=like.device)[:, :columns]


def chunk_rows(chunk_bytes: int, vocabulary: int, itemsize: int) -> int:
    """Rows of a chunk: whole tiles of a GEMM where there is room for one."""
    rows = chunk_bytes // (itemsize * vocabulary)
    return rows // 256 * 256 if rows >= 256 else max(rows, 1)


class Products:
    """The two products of a chunk, with a dense head or a packed one, which is decoded slice by slice of the vocabulary."""

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        self.packed = head.weight if isinstance(head.weight, Packed) else None
        self.weight = None if self.packed is not None else head.dense(dtype)
        self.dtype = dtype

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        assert self.packed is not None
        for at, part in slices(self.packed):
            yield at, decode(part, self.dtype)

    def logits(self, h: Tensor, z: Tensor) -> None:
        """z `[c, V]` = h Wᵀ."""
        if self.weight is not None:
            matmul(h, self.weight.T, z)
            return
        for at, weight in self._slices():
            matmul(h, weight.T, z[:, at])

    def gradient(self, d: Tensor, out: Tensor) -> None:
        """out `[c, H]` = d W; the slices of a packed head are summed in fp32."""
        if self.weight is not None:
            matmul(d, self.weight, out)
            return
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for at, weight in self._slices():
            matmul(d[:, at], weight, total, beta=1.0)
        out.copy_(total)


def cross_entropy(task: Task, tuning: Tuning = TUNING, *, exact: bool = False) -> Results:
    """Sum of losses, correct tokens, and the gradients of the sum. exact: logits kept in fp32, at the price of a slower product."""
    hidden, head, wants, n = task.hidden, task.head, task.wants, task.labelled
    vocabulary = head.vocabulary
    wide = exact and hidden.is_cuda and hidden.dtype != torch.float32
    size = max(min(chunk_rows(task.chunk_bytes, vocabulary, 4 if wide else hidden.element_size()), n), 1)
    rows = None if n == len(hidden) else task.rows()
    targets = task.labels if rows is None else task.labels[rows]
    products = Products(head, hidden.dtype)
    grad = wants.hidden or wants.weight or wants.bias
    losses = torch.empty(n, dtype=torch.float32, device=hidden.device)
    hits = torch.empty(n, dtype=torch.int32, device=hidden.device)
    dh = hidden.new_empty(n, hidden.shape[1]) if wants.hidden else None
    dw = torch.zeros(head.weight.shape, dtype=torch.float32, device=hidden.device) if wants.weight else None
    db = torch.zeros(vocabulary, dtype=torch.float32, device=hidden.device) if wants.bias else None
    chunk = _padded(size, vocabulary, hidden, hidden.dtype)
    gathered = None if rows is None else hidden.new_empty(size, hidden.shape[1])
    for start in range(0, n, size):
        at = slice(start, min(start + size, n))
        d = chunk[: at.stop - start]
        if rows is None or gathered is None:
            h = hidden[at]
        else:
            h = torch.index_select(hidden, 0, rows[at], out=gathered[: len(d)])
        z = d
        if wide:
            z = _padded(len(d), vocabulary, hidden, torch.float32)
            matmul(h, head.dense(h.dtype).T, z)
        else:
            products.logits(h, z)
        # A bias sums its gradient over the rows: in fp32, before it is rounded for the products.
        dz = _padded(len(d), vocabulary, hidden, torch.float32) if db is not None else d
        softmax_(z, dz if grad else None, targets[at], losses[at], hits[at], task, tuning)
        if db is not None:
            db += dz.sum(0)
            d.copy_(dz)
        if dh is not None:
            products.gradient(d, dh[at])
        if dw is not None:
            matmul(d.T, h, dw, beta=1.0)
    return Results(
        losses.sum(),
        hits.sum(),
        dh,
        None if dw is None else dw.to(head.weight.dtype),
        None if db is None or head.bias is None else db.to(head.bias.dtype),
    )
