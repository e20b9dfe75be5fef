"""The Triton kernel of the loss: a row of logits becomes its loss and, in place, its own gradient.

Why one program a row: rows under way at a time then fit the L2 cache, and the second reading of a row (the first finds the maximum
and the sum) costs no memory traffic. Sums, exponentials and logarithms are fp32, whatever logits are stored in.
Cost: logits read once and written once, and two exponentials each.

Letters: V = vocabulary.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.cross_entropy.parts import Task
from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype

LOWEST: tl.constexpr = tl.constexpr(-1.0e38)


@dataclass(frozen=True)
class Tuning:
    """Shape of the kernel. lanes x vec logits at a time by `warps` warps; keep: ask the cache to keep a row between its two
    readings; stages: of asynchronous loads."""

    lanes: int = 2048
    vec: int = 8
    warps: int = 16
    keep: bool = True
    stages: int = 1


TUNING = Tuning()


@triton.jit
def _tanh(x):
    """tanh by one exponential: never overflows, exact at both ends."""
    e = tl.exp(tl.abs(x) * -2.0)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def logits_of(x, bias, k, V: tl.constexpr, scale, cap, BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr):
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
def gradient_of(
    x, k, target, largest, factor, V: tl.constexpr, scale, cap, smoothing,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the products from their logits x at k; factor: the derivative by the log of the sum, over that sum."""
    g = tl.exp(x - largest) * factor
    if SMOOTH:
        g -= smoothing / V
    g -= tl.where(k == target, 1.0 - smoothing, 0.0)
    if CAPPED:
        g *= 1.0 - (x / cap) * (x / cap)
    if SCALED:
        g *= scale
    return tl.where(k < V, g, 0.0)


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
    x = logits_of(tl.load(z + k, mask=(k >= 0) & (k < stride_z), other=0.0), bias, k, V, scale, cap, BIAS, SCALED, CAPPED)
    at_target = tl.max(tl.max(tl.where(k == target, x, float("-inf")), 1), 0)
    earlier = tl.max(tl.max(tl.where(k < target, x, float("-inf")), 1), 0)

    top = tl.full([LANES], LOWEST, tl.float32)
    before = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    plain_sum = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, V, block, num_stages=STAGES):
        k = start + lane
        stored = tl.load(z + k, mask=k < stride_z, other=0.0, eviction_policy=KEPT)
        x = logits_of(stored, bias, k, V, scale, cap, BIAS, SCALED, CAPPED)
        before = tl.where(start == home, top, before)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        top = higher
        if SMOOTH:
            plain_sum += tl.sum(tl.where(k < V, x, 0.0), 1)
    largest = tl.max(top, 0)
    whole = tl.sum(total * tl.exp(top - largest), 0)
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
            x = logits_of(stored, bias, k, V, scale, cap, BIAS, SCALED, CAPPED)
            g = gradient_of(x, k, target, largest, factor, V, scale, cap, smoothing, SCALED, CAPPED, SMOOTH)
            tl.store(d + k, to_dtype(g, d.dtype.element_ty, INTERPRETED), mask=k < stride_d, eviction_policy=GONE)


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
