"""The Triton twins. Attention is cut along the cache: every piece keeps its maximum, its sum and its output, and whichever piece of
a key head ends last joins them.

Each launch lets the next one start at once and waits for the one before it where it first reads what that wrote (`gdc_wait`). What
was written before the step began can be read earlier: launches without early starts (torch's) stand between two tokens.
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

from halfbyte.kernels.decode_step.reference import PIECES, Heads, Scratch, Tops
from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.norm import NormSpec
from halfbyte.kernels.packed_gemv.launch import hopper

WARPS = 4
"""Of a program of attention."""
READ = 16384
"""Bytes of keys that a program reads at a time; as many of values, and the next ones meanwhile, in registers."""


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
def _turned(
    at, i, other, sign, c, s, inside, turning, weight, eps, offset,
    D: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """Heads `[N, BLOCK]` at addresses `at` (`[N, 1]`, or one), normed and turned, fp32. other: what element i turns with."""
    x = tl.load(at + i, mask=inside, other=0.0).to(tl.float32)
    y = x
    if ROTATION != "none":
        y = tl.load(at + other, mask=turning, other=0.0).to(tl.float32)
    if NORM:
        w = tl.load(weight + i, mask=i < D, other=0.0).to(tl.float32) + offset
        u = w
        if ROTATION != "none":
            u = tl.load(weight + other, mask=(other >= 0) & (other < D), other=0.0).to(tl.float32) + offset
        mean = tl.sum(x, 1)[:, None] / D if LAYER else 0.0
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / D + eps)
        x, y = centred * rstd * w, (y - mean) * rstd * u
    if ROTATION != "none":
        x = x * c + tl.where(turning, sign * y * s, 0.0)
    return x


@triton.jit
def _dot(a, b, INTERPRETED: tl.constexpr):
    """a b in fp32; the interpreter (3.6) has no product of bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _places(keys, values, base, start, stop, n, i, G: tl.constexpr, D: tl.constexpr):
    """Keys and values `[KEYS, BLOCK]` of the places from `start` on."""
    place = start + n
    at = base + place[:, None] * (G * D) + i
    mask = (place < stop)[:, None] & (i < D)
    return tl.load(keys + at, mask=mask, other=0.0), tl.load(values + at, mask=mask, other=0.0)


@triton.jit
def _capped(scores, cap, CAP: tl.constexpr):
    """Scores to the base 2."""
    if CAP:
        scores = cap * (2 / (1 + tl.exp(-2 * scores / cap)) - 1)
    return scores * 1.4426950408889634


@triton.jit
def _joined(
    partial, tops, head, live, out, i, feed, fed,
    D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, FEED: tl.constexpr, FED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The pieces of one head, summed in one order whichever of them came last. head: its number among all rows'.

    FEED: columns of `feed` `[d, FEED]`, by which the head is multiplied into `fed` `[FEED]`; FED as a power of two.
    """
    s = tl.arange(0, SPLITS)
    if FEED > 0:
        column, r = tl.arange(0, BLOCK)[:, None], tl.arange(0, FED)
        mask = (column < D) & (r < FEED)[None, :]
        lines = tl.load(feed + column * FEED + r[None, :], mask=mask, other=0.0).to(tl.float32)
    at = partial + (head * SPLITS + s)[:, None] * D + i
    acc = tl.load(at, mask=live[:, None] & (i < D), other=0.0, cache_modifier=".cg")
    top = tl.load(tops + head * (2 * SPLITS) + s, mask=live, other=-float("inf"), cache_modifier=".cg")
    total = tl.load(tops + head * (2 * SPLITS) + SPLITS + s, mask=live, other=0.0, cache_modifier=".cg")
    weight = tl.exp2(top - tl.max(top, 0))
    y = tl.sum(acc * weight[:, None], 0)[None, :] / tl.sum(total * weight, 0)
    y = to_dtype(y, out.dtype.element_ty, INTERPRETED)
    tl.store(out + i, y, mask=i < D)
    if FEED > 0:
        tl.store(fed + r, tl.sum(tl.trans(y).to(tl.float32) * lines, 0), mask=r < FEED)


@triton.jit
def _attend(
    qkv, position, q_weight, k_weight, cos, sin, keys, values, partial, tops, counters, out, feed, fed,
    stride, out_stride, places, turns, eps, offset, scale, cap, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, SPLITS: tl.constexpr,
    KEYS: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    FEED: tl.constexpr, FED: tl.constexpr, FED_ROWS: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One piece of the cache for the query heads of one key head; the last piece has the newest place too, from qkv itself.

    Old places and positions were written by the tokens before: they are read before the wait for qkv.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    row, group, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    share: tl.constexpr = H // G
    newest = tl.load(position + row)
    first = tl.maximum(newest + 1 - window, 0) if WINDOW else newest * 0
    per = tl.maximum(tl.cdiv(tl.cdiv(newest - first, SPLITS), KEYS), 1) * KEYS
    pieces = tl.maximum(tl.cdiv(newest - first, per), 1)
    if split < pieces:
        start = first + split * per
        stop = tl.minimum(start + per, newest)
        h, i, n = tl.arange(0, QUERIES)[:, None], tl.arange(0, BLOCK)[None, :], tl.arange(0, KEYS)
        base = (row.to(tl.int64) * places * G + group) * D
        k, v = _places(keys, values, base, start, stop, n, i, G, D)
        other, table, sign = i, i, tl.where(i % 2 == 0, -1.0, 1.0)
        if ROTATION == "half":
            other = tl.where(i < turns // 2, i + turns // 2, i - turns // 2)
            sign = tl.where(i < turns // 2, -1.0, 1.0)
        elif ROTATION != "none":
            other = i ^ 1
            if ROTATION == "interleaved-halves":
                table = i // 2
        c, s = sign, sign
        if ROTATION != "none":
            c = tl.load(cos + newest * turns + table, mask=i < turns, other=1.0).to(tl.float32)
            s = tl.load(sin + newest * turns + table, mask=i < turns, other=0.0).to(tl.float32)
        if PDL:
            cuda.gdc_wait()
        source = qkv + row * stride
        inside = (h < share) & (i < D)
        x = _turned(source + (group * share + h) * D, i, other, sign, c, s, inside, inside & (i < turns), q_weight, eps, offset,
                    D, ROTATION, NORM, LAYER)  # fmt: skip
        new = _turned(source + (H + group) * D, i, other, sign, c, s, i < D, i < tl.minimum(turns, D), k_weight, eps, offset,
                      D, ROTATION, NORM, LAYER)  # fmt: skip
        query = to_dtype(x, k.dtype, INTERPRETED)
        new = to_dtype(new, k.dtype, INTERPRETED)
        value = to_dtype(tl.load(source + (H + G + group) * D + i, mask=i < D, other=0.0).to(tl.float32), v.dtype, INTERPRETED)
        mine = split == pieces - 1
        kept = i < tl.where(mine, D, 0)
        tl.store(keys + base + newest * (G * D) + i, new, mask=kept)
        tl.store(values + base + newest * (G * D) + i, value, mask=kept)
        score = tl.sum(query.to(tl.float32) * new.to(tl.float32), 1) * scale
        top = tl.where(mine, _capped(score, cap, CAP), -float("inf"))
        total = tl.where(mine, 1.0, tl.zeros((QUERIES,), tl.float32))
        acc = tl.where(kept, value.to(tl.float32), 0.0) + tl.zeros((QUERIES, BLOCK), tl.float32)
        while start < stop:
            next_k, next_v = _places(keys, values, base, start + KEYS, stop, n, i, G, D)
            scores = _capped(_dot(query, tl.trans(k), INTERPRETED) * scale, cap, CAP)
            scores = tl.where((start + n < stop)[None, :], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None] + _dot(to_dtype(p, v.dtype, INTERPRETED), v, INTERPRETED)
            top, k, v = new_top, next_k, next_v
            start += KEYS
        heads = row * H + group * share + tl.arange(0, QUERIES)
        alive = tl.arange(0, QUERIES) < share
        tl.store(partial + (heads * SPLITS + split)[:, None] * D + i, acc, mask=inside)
        tl.store(tops + heads * (2 * SPLITS) + split, top, mask=alive)
        tl.store(tops + heads * (2 * SPLITS) + SPLITS + split, total, mask=alive)
        tl.debug_barrier()
        if tl.atomic_add(counters + row * G + group, 1, sem="acq_rel", scope="gpu") == pieces - 1:
            tl.store(counters + row * G + group, 0)
            live = tl.arange(0, SPLITS) < pieces
            there = out + row * out_stride + group * share * D
            if share <= 8:
                for q in tl.static_range(share):
                    n_q = group * share + q
                    _joined(partial, tops, row * H + n_q, live, there + q * D, i, feed + n_q * D * FEED,
                            fed + (n_q * FED_ROWS + row) * FEED, D, BLOCK, SPLITS, FEED, FED, INTERPRETED)  # fmt: skip
            else:
                for q in range(share):
                    n_q = group * share + q
                    _joined(partial, tops, row * H + n_q, live, there + q * D, i, feed + n_q * D * FEED,
                            fed + (n_q * FED_ROWS + row) * FEED, D, BLOCK, SPLITS, FEED, FED, INTERPRETED)  # fmt: skip


@triton.jit
def _likeliest(
    scores, values, places, counters, out, width, stride,
    PIECES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest of a piece of a row, and of the row by the piece that ends last. Without any (all NaN): the last column."""
    _begin(PDL)
    row, piece, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    per = tl.cdiv(width, PIECES * 8) * 8
    column = piece * per + i
    mask = (i < per) & (column < width)
    x = tl.load(scores + row * stride + column, mask=mask, other=-float("inf")).to(tl.float32)
    tl.store(values + row * PIECES + piece, tl.max(x, 0))
    tl.store(places + row * PIECES + piece, tl.min(tl.where(mask & (x == tl.max(x, 0)), column, width - 1), 0))
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == PIECES - 1:
        tl.store(counters + row, 0)
        p = row * PIECES + tl.arange(0, PIECES)
        top, place = tl.load(values + p, cache_modifier=".cg"), tl.load(places + p, cache_modifier=".cg")
        tl.store(out + row, tl.min(tl.where(top == tl.max(top, 0), place, width - 1), 0).to(tl.int64))


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


def attend(
    qkv: Tensor, position: Tensor, heads: Heads, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor,
    scratch: Scratch, out: Tensor, feed: Tensor | None, fed: Tensor | None,
) -> None:  # fmt: skip
    """See the package."""
    spec, turns, device = heads.spec or NormSpec(), 0 if cos is None else cos.shape[1], qkv.device
    assert keys.is_contiguous() and values.is_contiguous() and (cos is None or cos.is_contiguous())
    partial, splits, block = scratch.partial, scratch.partial.shape[2], max(triton.next_power_of_2(heads.size), 16)
    _attend[(qkv.shape[0] * heads.kv, splits)](
        qkv, position, qkv if heads.q_weight is None else heads.q_weight, qkv if heads.k_weight is None else heads.k_weight,
        qkv if cos is None else cos, qkv if sin is None else sin, keys, values, partial, scratch.tops, scratch.counters, out,
        qkv if feed is None else feed, partial if fed is None else fed,
        qkv.stride(0), out.stride(0), keys.shape[1], turns, spec.eps, spec.offset, heads.scale, heads.cap or 1.0, heads.window or 0,
        H=heads.query, G=heads.kv, D=heads.size, BLOCK=block, QUERIES=max(triton.next_power_of_2(heads.query // heads.kv), 16),
        SPLITS=splits, KEYS=keys_of(block, keys.dtype), ROTATION=heads.rotation if cos is not None else "none",
        NORM=heads.spec is not None, LAYER=spec.kind == "layer", CAP=bool(heads.cap), WINDOW=heads.window is not None,
        FEED=0 if feed is None else feed.shape[1], FED=16 if feed is None else triton.next_power_of_2(feed.shape[1]),
        FED_ROWS=1 if fed is None else fed.shape[1],
        PDL=hopper(device), INTERPRETED=INTERPRETED, **_options(device, WARPS),
    )  # fmt: skip


def likeliest(scores: Tensor, tops: Tops, out: Tensor) -> None:
    """See the package."""
    rows, width = scores.shape
    _likeliest[(rows, PIECES)](
        scores, tops.values, tops.places, tops.counters, out, width, scores.stride(0), PIECES=PIECES,
        BLOCK=triton.next_power_of_2(triton.cdiv(width, PIECES * 8) * 8), PDL=hopper(scores.device), **_options(scores.device, 4),
    )  # fmt: skip


def keys_of(block: int, dtype: torch.dtype) -> int:
    """Places that a program reads at a time."""
    return max(16, min(64, READ // (block * dtype.itemsize)))
