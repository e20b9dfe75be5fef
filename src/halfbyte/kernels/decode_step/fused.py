"""The Triton twins. Attention is cut along the cache: every piece keeps its maximum, its sum and its output, and a second launch
joins them.

Each launch lets the next one start at once and waits for the one before it where it first reads what that wrote (`gdc_wait`).
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from halfbyte.kernels.decode_step.reference import Heads
from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.norm import NormSpec
from halfbyte.kernels.packed_gemv.launch import hopper
from halfbyte.kernels.packed_gemv.product import Pieces

KEYS = 64
"""Places of the cache that a program of attention reads at a time."""


@triton.jit
def _begin(PDL: tl.constexpr):
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def _unit(x, inside, n, eps, LAYER: tl.constexpr):
    """x less its mean (LAYER), over its root mean square."""
    if LAYER:
        x = tl.where(inside, x - tl.sum(x, 0) / n, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / n + eps)


@triton.jit
def _normalise(
    x, weight, bias, out, n, x_stride, out_stride, eps, offset,
    LAYER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    i = tl.arange(0, BLOCK)
    inside = i < n
    row = tl.program_id(0)
    w = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHT:
        w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32) + offset
    _begin(PDL)
    y = _unit(tl.load(x + row * x_stride + i, mask=inside, other=0.0).to(tl.float32), inside, n, eps, LAYER) * w
    if BIAS:
        y += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + i, to_dtype(y, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _place(
    qkv, position, q_weight, k_weight, cos, sin, q, keys, values, stride, q_stride, places, turns, eps, offset,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr,
    LAYER: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One head of one row a program: H query heads, G of keys, G of values."""
    _begin(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < D
    at = tl.load(position + row)
    other = i
    sign = tl.where(i % 2 == 0, -1.0, 1.0)
    table = i
    if ROTATION == "half":
        other = tl.where(i < turns // 2, i + turns // 2, i - turns // 2)
        sign = tl.where(i < turns // 2, -1.0, 1.0)
    elif ROTATION != "none":
        other = i ^ 1
        if ROTATION == "interleaved-halves":
            table = i // 2
    turning = inside & (i < tl.where(head < H + G, turns, 0))  # a number beside a block would be no mask for the interpreter
    source = qkv + row * stride + head * D
    x = tl.load(source + i, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + other, mask=turning, other=0.0).to(tl.float32)
    if NORM and head < H + G:
        weight = q_weight if head < H else k_weight
        mean = tl.sum(x, 0) / D if LAYER else 0.0
        rstd = tl.rsqrt(tl.sum(tl.where(inside, (x - mean) * (x - mean), 0.0), 0) / D + eps)
        x = (x - mean) * rstd * (tl.load(weight + i, mask=inside, other=0.0).to(tl.float32) + offset)
        y = (y - mean) * rstd * (tl.load(weight + other, mask=turning, other=0.0).to(tl.float32) + offset)
    if ROTATION != "none":
        c = tl.load(cos + at * turns + table, mask=turning, other=1.0).to(tl.float32)
        s = tl.load(sin + at * turns + table, mask=turning, other=0.0).to(tl.float32)
        x = x * c + sign * y * s
    out = to_dtype(x, q.dtype.element_ty, INTERPRETED)
    slot = (row * places + at) * G * D
    if head < H:
        tl.store(q + row * q_stride + head * D + i, out, mask=inside)
    elif head < H + G:
        tl.store(keys + slot + (head - H) * D + i, out, mask=inside)
    else:
        tl.store(values + slot + (head - H - G) * D + i, out, mask=inside)


@triton.jit
def _dot(a, b, INTERPRETED: tl.constexpr):
    """a b in fp32; the interpreter (3.6) has no product of bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(
    q, keys, values, position, partial, q_stride, places, scale, cap, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, SPLITS: tl.constexpr,
    KEYS: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One piece of the cache for the query heads of one key head: output, maximum (base 2) and sum, fp32."""
    _begin(PDL)
    row, group, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    last = tl.load(position + row) + 1
    first = tl.maximum(last - window, 0) if WINDOW else last * 0
    per = tl.cdiv(tl.cdiv(last - first, SPLITS), KEYS) * KEYS
    start = first + split * per
    stop = tl.minimum(start + per, last)
    h, i, n = tl.arange(0, QUERIES), tl.arange(0, BLOCK), tl.arange(0, KEYS)
    share: tl.constexpr = H // G
    head = group * share + h
    query = tl.load(q + row * q_stride + head[:, None] * D + i[None, :], mask=(h < share)[:, None] & (i < D)[None, :], other=0.0)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, BLOCK), tl.float32)
    while start < stop:
        place = start + n
        seen = place < stop
        at = ((row * places + place) * G + group) * D
        mask = seen[:, None] & (i < D)[None, :]
        k = tl.load(keys + at[:, None] + i[None, :], mask=mask, other=0.0)
        v = tl.load(values + at[:, None] + i[None, :], mask=mask, other=0.0)
        scores = _dot(query, tl.trans(k), INTERPRETED) * scale
        if CAP:
            scores = cap * (2 / (1 + tl.exp(-2 * scores / cap)) - 1)
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + _dot(to_dtype(p, v.dtype, INTERPRETED), v, INTERPRETED)
        top = new
        start += KEYS
    out = partial + ((row * H + head) * SPLITS + split) * (D + 2)
    tl.store(out[:, None] + i[None, :], acc, mask=(h < share)[:, None] & (i < D)[None, :])
    tl.store(out + D, top, mask=h < share)
    tl.store(out + D + 1, total, mask=h < share)


@triton.jit
def _join(
    partial, out, feed, fed, out_stride,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, FEED: tl.constexpr, FED: tl.constexpr,
    PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The pieces of one head. FEED: columns of `feed` `[H D, FEED]`, by which the head is multiplied into its line of `fed`."""
    row, head = tl.program_id(0), tl.program_id(1)
    i, s, r = tl.arange(0, BLOCK), tl.arange(0, SPLITS), tl.arange(0, FED)
    if FEED > 0:
        mask = (i < D)[:, None] & (r < FEED)[None, :]
        lines = tl.load(feed + (head * D + i)[:, None] * FEED + r[None, :], mask=mask, other=0.0).to(tl.float32)
    _begin(PDL)
    piece = partial + ((row * H + head) * SPLITS + s) * (D + 2)
    top = tl.load(piece + D)
    weight = tl.exp2(top - tl.max(top, 0))
    acc = tl.load(piece[:, None] + i[None, :], mask=(i < D)[None, :], other=0.0)
    y = tl.sum(acc * weight[:, None], 0) / tl.sum(tl.load(piece + D + 1) * weight, 0)
    y = to_dtype(y, out.dtype.element_ty, INTERPRETED)
    tl.store(out + row * out_stride + head * D + i, y, mask=i < D)
    if FEED > 0:
        tl.store(fed + (head * 2 + row) * FEED + r, tl.sum(y.to(tl.float32)[:, None] * lines, 0), mask=r < FEED)


def _options(device: torch.device, warps: int) -> dict[str, Any]:
    return {} if INTERPRETED else {"num_warps": warps, "launch_pdl": hopper(device)}


def normalise(x: Tensor, spec: NormSpec, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """See the package."""
    n = x.shape[1]
    _normalise[(x.shape[0],)](
        x, x if weight is None else weight, x if bias is None else bias, out, n, x.stride(0), out.stride(0), spec.eps, spec.offset,
        LAYER=spec.kind == "layer", WEIGHT=weight is not None, BIAS=bias is not None, BLOCK=triton.next_power_of_2(n),
        PDL=hopper(x.device), INTERPRETED=INTERPRETED, **_options(x.device, 8 if n > 1024 else 4),
    )  # fmt: skip


def place(
    qkv: Tensor, position: Tensor, heads: Heads, cos: Tensor | None, sin: Tensor | None, q: Tensor, keys: Tensor, values: Tensor
) -> None:
    """See the package."""
    spec, turns = heads.spec or NormSpec(), 0 if cos is None else cos.shape[1]
    assert keys.is_contiguous() and values.is_contiguous() and (cos is None or cos.is_contiguous())
    _place[(qkv.shape[0], heads.query + 2 * heads.kv)](
        qkv, position, qkv if heads.q_weight is None else heads.q_weight, qkv if heads.k_weight is None else heads.k_weight,
        qkv if cos is None else cos, qkv if sin is None else sin, q, keys, values, qkv.stride(0), q.stride(0), keys.shape[1], turns,
        spec.eps, spec.offset, H=heads.query, G=heads.kv, D=heads.size, BLOCK=triton.next_power_of_2(heads.size),
        ROTATION=heads.rotation if cos is not None else "none", NORM=heads.spec is not None, LAYER=spec.kind == "layer",
        PDL=hopper(q.device), INTERPRETED=INTERPRETED, **_options(q.device, 1),
    )  # fmt: skip


def attend(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, heads: Heads, partial: Tensor, out: Tensor, feeds: Pieces | None
) -> None:
    """See the package."""
    splits, block = partial.shape[2], max(triton.next_power_of_2(heads.size), 16)
    _attend[(q.shape[0] * heads.kv, splits)](
        q, keys, values, position, partial, q.stride(0), keys.shape[1], heads.scale, heads.cap or 1.0, heads.window or 0,
        H=heads.query, G=heads.kv, D=heads.size, BLOCK=block, QUERIES=max(triton.next_power_of_2(heads.query // heads.kv), 16),
        SPLITS=splits, KEYS=KEYS, CAP=bool(heads.cap), WINDOW=heads.window is not None, PDL=hopper(q.device),
        INTERPRETED=INTERPRETED, **_options(q.device, 4),
    )  # fmt: skip
    _join[(q.shape[0], heads.query)](
        partial, out, out if feeds is None else feeds.at, partial if feeds is None else feeds.sums, out.stride(0),
        H=heads.query, D=heads.size, BLOCK=block, SPLITS=splits, FEED=0 if feeds is None else feeds.at.shape[1],
        FED=16 if feeds is None else triton.next_power_of_2(feeds.at.shape[1]), PDL=hopper(q.device), INTERPRETED=INTERPRETED,
        **_options(q.device, 2),
    )  # fmt: skip
