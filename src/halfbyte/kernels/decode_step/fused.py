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
"""Bytes of keys that a program reads at a time, and as many of values: in registers, the first ones before the wait."""
HEADS = 4
"""Heads joined at a time, at most."""
JOINED = 8192
"""Numbers of the pieces' outputs that a program reads at a time to join them."""
AHEAD = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


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
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b in fp32; the interpreter (3.6) has no product of bf16."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _read(cache, start, stop, n, i, G: tl.constexpr, D: tl.constexpr):
    """Keys or values `[KEYS, BLOCK]` of the places from `start` on."""
    mask = (n < stop - start)[:, None] & (i < D)
    return tl.load(cache + start.to(tl.int64) * (G * D) + n[:, None] * (G * D) + i, mask=mask, other=0.0)


@triton.jit
def _scored(scores, scale, cap, CAP: tl.constexpr):
    """Scores to the base 2."""
    if CAP:
        return cap * (2 / (1 + tl.exp(scores * (-2 * scale / cap))) - 1) * 1.4426950408889634
    else:
        return scores * (scale * 1.4426950408889634)


@triton.jit
def _part(partial, done, s, pieces, alive, h, i, D: tl.constexpr, SPLITS: tl.constexpr):
    """Pieces s + done of some heads: `[HEADS, CHUNK, BLOCK]`."""
    mask = (alive[:, None] & (s + done < pieces))[:, :, None] & (i < D)[None, :, :]
    at = (h[:, None] * SPLITS + s + done)[:, :, None] * D + i[None, :, :]
    return tl.load(partial + at, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _top(tops, s, pieces, alive, h, SPLITS: tl.constexpr, other: tl.constexpr):
    """The maxima of pieces s of some heads; with `tops` SPLITS further on their sums."""
    mask = alive[:, None] & (s < pieces)
    return tl.load(tops + h[:, None] * (2 * SPLITS) + s, mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def _joined(
    partial, tops, pieces, alive, h, i, D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """The pieces of HEADS heads, summed in one order whichever of them came last: `[HEADS, BLOCK]`. alive `[HEADS]`."""
    s, some = tl.arange(0, SPLITS)[None, :], tl.arange(0, CHUNK)[None, :]
    part = _part(partial, 0, some, pieces, alive, h, i, D, SPLITS)
    each = _top(tops, s, pieces, alive, h, SPLITS, -float("inf"))
    sums = _top(tops + SPLITS, s, pieces, alive, h, SPLITS, 0.0)
    top = tl.max(each, 1)
    times = 1 / tl.sum(sums * tl.exp2(each - top[:, None]), 1)
    acc = tl.zeros((HEADS, BLOCK), tl.float32)
    for done in tl.static_range(0, SPLITS, CHUNK):
        if CHUNK < SPLITS:
            each = _top(tops, some + done, pieces, alive, h, SPLITS, -float("inf"))
        acc += tl.sum(part * (tl.exp2(each - top[:, None]) * times[:, None])[:, :, None], 1)
        if done + CHUNK < SPLITS:
            part = _part(partial, done + CHUNK, some, pieces, alive, h, i, D, SPLITS)
    return tl.where(alive[:, None] & (i < D), acc, 0.0)


@triton.jit
def _lines(feed, first, h, alive, i, K: tl.constexpr, D: tl.constexpr, FEED: tl.constexpr):
    """16 rows of `feed` from the first on, at the columns of some heads: `[HEADS, 16, BLOCK]`."""
    r = (tl.arange(0, 16) + first)[None, :, None]
    mask = (r < FEED) & alive[:, None, None] & (i < D)[None, :, :]
    return tl.load(feed + r * K + h[:, None, None] * D + i[None, :, :], mask=mask, other=0.0)


@triton.jit
def _join(
    partial, tops, out, feed, fed, pieces, row, group, i,
    H: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, FEED: tl.constexpr, FED_ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The SHARE heads of a key head, HEADS at a time, into `out`, and what each makes of FEED rows of `feed` into `fed`."""
    for first in range(0, SHARE, HEADS):
        head = tl.arange(0, HEADS) + (group * SHARE + first)
        alive = tl.arange(0, HEADS) + first < SHARE
        if FEED > 0:
            lines = _lines(feed, 0, head, alive, i, H * D, D, FEED)
        y = _joined(partial, tops, pieces, alive, head + row * H, i, D, BLOCK, SPLITS, CHUNK, HEADS)
        y = to_dtype(y, out.dtype.element_ty, INTERPRETED)
        tl.store(out + head[:, None] * D + i, y, mask=alive[:, None] & (i < D))
        if FEED > 0:
            r = tl.arange(0, 16)[None, :]
            for r0 in range(0, FEED, 16):
                sums = tl.sum(lines.to(tl.float32) * y.to(tl.float32)[:, None, :], 2)
                tl.store(fed + head[:, None] * (FED_ROWS * FEED) + r + r0, sums, mask=alive[:, None] & (r < FEED - r0))
                if r0 + 16 < FEED:
                    lines = _lines(feed, r0 + 16, head, alive, i, H * D, D, FEED)


@triton.jit
def _ahead(
    feed, counter, group, K: tl.constexpr, WIDE: tl.constexpr, FEED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """What the joining piece needs, towards the L2 cache: gigabytes of weights have passed there since the last token."""
    tl.inline_asm_elementwise(AHEAD, "=r,l", [counter.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
    if FEED > 0:
        r, c = tl.minimum(tl.arange(0, ROWS)[:, None], FEED - 1), tl.minimum(tl.arange(0, COLUMNS)[None, :] * 64, WIDE - 1)
        at = feed + r * K + c + group * WIDE
        tl.inline_asm_elementwise(AHEAD, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _attend(
    qkv, position, q_weight, k_weight, cos, sin, keys, values, partial, tops, counters, out, feed, fed,
    stride, out_stride, places, turns, eps, offset, scale, cap, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, SPLITS: tl.constexpr,
    KEYS: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, FEED: tl.constexpr, FED_ROWS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One piece of the cache for the query heads of one key head; the newest place, in the last piece, comes from qkv itself.

    Old places and positions were written by the tokens before: they are read before the wait for qkv.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    row, group, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    share: tl.constexpr = H // G
    newest = tl.load(position + row).to(tl.int32)
    first = tl.maximum(newest + 1 - window, 0) if WINDOW else newest * 0
    per = tl.maximum(tl.cdiv(tl.cdiv(newest - first, SPLITS), KEYS), 1) * KEYS
    pieces = tl.maximum(tl.cdiv(newest - first, per), 1)
    if split < pieces:
        start = first + split * per
        stop = tl.minimum(start + per, newest)
        h, i, n = tl.arange(0, QUERIES)[:, None], tl.arange(0, BLOCK)[None, :], tl.arange(0, KEYS)
        base = (row.to(tl.int64) * places * G + group) * D
        keys += base
        values += base
        k = _read(keys, start, stop, n, i, G, D)
        v = _read(values, start, stop, n, i, G, D)
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
        counter = counters + row * G + group
        if PDL:
            if split == 0:
                _ahead(feed, counter, group, H * D, share * D, FEED, ROWS, COLUMNS)
            cuda.gdc_wait()
        source = qkv + row * stride
        inside = (h < share) & (i < D)
        value = tl.load(source + (H + G + group) * D + i, mask=i < D, other=0.0)
        new = _turned(source + (H + group) * D, i, other, sign, c, s, i < D, i < tl.minimum(turns, D), k_weight, eps, offset,
                      D, ROTATION, NORM, LAYER)  # fmt: skip
        x = _turned(source + (group * share + h) * D, i, other, sign, c, s, inside, inside & (i < turns), q_weight, eps, offset,
                    D, ROTATION, NORM, LAYER)  # fmt: skip
        query = to_dtype(x, k.dtype, INTERPRETED)
        new = to_dtype(new, k.dtype, INTERPRETED)
        value = to_dtype(value.to(tl.float32), v.dtype, INTERPRETED)
        mine = split == pieces - 1
        kept = i < tl.where(mine, D, 0)
        score = _scored(tl.sum(query.to(tl.float32) * new.to(tl.float32), 1), scale, cap, CAP)
        top = tl.where(mine, score, -float("inf"))
        total = tl.where(n < tl.where(mine, 1, 0), 1.0, 0.0)[None, :] + tl.zeros((QUERIES, KEYS), tl.float32)
        acc = tl.where(kept, value.to(tl.float32), 0.0) + tl.zeros((QUERIES, BLOCK), tl.float32)
        while start < stop:
            scores = _dot(query, tl.trans(k), tl.zeros((QUERIES, KEYS), tl.float32), INTERPRETED)
            k = _read(keys, start + KEYS, stop, n, i, G, D)
            scores = tl.where((n < stop - start)[None, :], _scored(scores, scale, cap, CAP), -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade[:, None] + p
            acc = _dot(to_dtype(p, v.dtype, INTERPRETED), v, acc * fade[:, None], INTERPRETED)
            v = _read(values, start + KEYS, stop, n, i, G, D)
            top = new_top
            start += KEYS
        heads = tl.arange(0, QUERIES) + (row * H + group * share)
        alive = tl.arange(0, QUERIES) < share
        tl.store(partial + (heads * SPLITS + split)[:, None] * D + i, acc, mask=inside)
        tl.store(tops + heads * (2 * SPLITS) + split, top, mask=alive)
        tl.store(tops + heads * (2 * SPLITS) + SPLITS + split, tl.sum(total, 1), mask=alive)
        at = newest.to(tl.int64) * (G * D) + i
        tl.store(keys + at, new, mask=kept)
        tl.store(values + at, value, mask=kept)
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == pieces - 1:
            tl.store(counter, 0)
            _join(partial, tops, out + row * out_stride, feed, fed + row * FEED, pieces, row, group, i, H, share, D, BLOCK, SPLITS,
                  CHUNK, HEADS, FEED, FED_ROWS, INTERPRETED)  # fmt: skip


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
    splits, block = scratch.partial.shape[2], max(triton.next_power_of_2(heads.size), 16)
    share, columns = heads.query // heads.kv, 0 if feed is None else feed.shape[0]
    joined = min(triton.next_power_of_2(share), HEADS)
    _attend[(qkv.shape[0] * heads.kv, splits)](
        qkv, position, qkv if heads.q_weight is None else heads.q_weight, qkv if heads.k_weight is None else heads.k_weight,
        qkv if cos is None else cos, qkv if sin is None else sin, keys, values, scratch.partial, scratch.tops, scratch.counters,
        out, qkv if feed is None else feed, scratch.tops if fed is None else fed,
        qkv.stride(0), out.stride(0), keys.shape[1], turns, spec.eps, spec.offset, heads.scale, heads.cap or 1.0, heads.window or 0,
        H=heads.query, G=heads.kv, D=heads.size, BLOCK=block, QUERIES=max(triton.next_power_of_2(share), 16),
        SPLITS=splits, KEYS=keys_of(block, keys.dtype), HEADS=joined, CHUNK=min(splits, max(JOINED // (joined * block), 1)),
        ROTATION=heads.rotation if cos is not None else "none", NORM=heads.spec is not None, LAYER=spec.kind == "layer",
        CAP=bool(heads.cap), WINDOW=heads.window is not None, FEED=columns, FED_ROWS=1 if fed is None else fed.shape[1],
        ROWS=triton.next_power_of_2(max(columns, 1)), COLUMNS=triton.next_power_of_2(triton.cdiv(share * heads.size, 64)),
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
