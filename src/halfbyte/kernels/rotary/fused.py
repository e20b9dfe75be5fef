"""The Triton twins: all heads of a token in one program, so that its tables are read once; offsets of tokens are int64.

A head is three pieces in registers: a and b, the two of each pair that turn, and the tail that stays. For style half a and b are
runs of neighbours; the interleaved styles load the run of both and split it: memory is always read and written in runs.

Letters: T tokens, D head size, R elements that turn (0: none do), HALF and TAIL: R / 2 and D - R rounded up to powers of two, ROWS
tokens a program, HEADS heads and BLOCK the same rounded up.
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
from halfbyte.kernels.rotary.reference import Rotation

Tile = tuple[int, int]
"""Tokens of a program, and its warps."""


@triton.jit
def _tokens(T, ROWS: tl.constexpr):
    """The tokens of this program, `[ROWS, 1, 1]` int64, and whether they exist."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    return token, token < T


@triton.jit
def _heads(HEADS: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.arange(0, BLOCK)[None, :, None]
    return head.to(tl.int64), head < HEADS


@triton.jit
def _pairs(at, alive, R: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr):
    """(a, b) fp32 `[.., HALF]` of the first R elements at `at`. HALVES: style half."""
    if HALVES:
        i = tl.arange(0, HALF)[None, None, :]
        mask = alive & (i < R // 2)
        a, b = tl.load(at + i, mask=mask, other=0.0), tl.load(at + (R // 2 + i), mask=mask, other=0.0)
    else:
        i = tl.arange(0, 2 * HALF)[None, None, :]
        both = tl.load(at + i, mask=alive & (i < R), other=0.0)
        a, b = tl.split(tl.reshape(both, [both.shape[0], both.shape[1], HALF, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _load(at, alive, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, HALVES: tl.constexpr):
    """(a, b, tail) of heads at `at` `[ROWS, BLOCK, 1]`; a piece that is not there is one zero."""
    a = tl.zeros(at.shape, tl.float32)
    b, tail = a, a
    if R > 0:
        a, b = _pairs(at, alive, R, HALF, HALVES)
    if D > R:
        i = tl.arange(0, TAIL)[None, None, :]
        tail = tl.load(at + (R + i), mask=alive & (i < D - R), other=0.0).to(tl.float32)
    return a, b, tail


@triton.jit
def _store(
    at, alive, a, b, tail, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, HALVES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The mirror of `_load`."""
    dtype: tl.constexpr = at.dtype.element_ty
    if R > 0:
        if HALVES:
            i = tl.arange(0, HALF)[None, None, :]
            mask = alive & (i < R // 2)
            tl.store(at + i, to_dtype(a, dtype, INTERPRETED), mask=mask)
            tl.store(at + (R // 2 + i), to_dtype(b, dtype, INTERPRETED), mask=mask)
        else:
            i = tl.arange(0, 2 * HALF)[None, None, :]
            both = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * HALF])
            tl.store(at + i, to_dtype(both, dtype, INTERPRETED), mask=alive & (i < R))
    if D > R:
        i = tl.arange(0, TAIL)[None, None, :]
        tl.store(at + (R + i), to_dtype(tail, dtype, INTERPRETED), mask=alive & (i < D - R))


@triton.jit
def _tables(cos, sin, token, alive, stride, R: tl.constexpr, HALF: tl.constexpr, STYLE: tl.constexpr, INVERSE: tl.constexpr):
    """(cos of a, cos of b, factor of b in a, factor of a in b), each fp32 `[ROWS, 1, HALF]`."""
    if R == 0:
        one = tl.zeros(token.shape, tl.float32)
        ca, cb, sa, sb = one, one, one, one
    elif STYLE == "interleaved-halves":
        i = tl.arange(0, HALF)[None, None, :]
        mask = alive & (i < R // 2)
        ca = tl.load(cos + token * stride + i, mask=mask, other=0.0).to(tl.float32)
        sa = tl.load(sin + token * stride + i, mask=mask, other=0.0).to(tl.float32)
        cb, sb = ca, sa
    else:
        ca, cb = _pairs(cos + token * stride, alive, R, HALF, STYLE == "half")
        sa, sb = _pairs(sin + token * stride, alive, R, HALF, STYLE == "half")
    if INVERSE:
        return ca, cb, sb, -sa
    else:
        return ca, cb, -sa, sb


@triton.jit
def _turn(a, b, ca, cb, sa, sb, R: tl.constexpr):
    if R > 0:
        return a * ca + b * sa, b * cb + a * sb
    else:
        return a, b


@triton.jit
def _weights(
    weight, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, HALVES: tl.constexpr, OFFSET: tl.constexpr
):
    """Factors of the three pieces, `[1, 1, ..]`."""
    zero = tl.zeros([1, 1, 1], tl.int32)
    a, b, tail = _load(weight + zero, zero == 0, D, R, HALF, TAIL, HALVES)
    return a + OFFSET, b + OFFSET, tail + OFFSET


@triton.jit
def _dot(a, b, tail, x, y, z):
    """Sum over a head of the products of its pieces, `[ROWS, BLOCK, 1]`."""
    return tl.sum(a * x, axis=2, keep_dims=True) + tl.sum(b * y, axis=2, keep_dims=True) + tl.sum(tail * z, axis=2, keep_dims=True)


@triton.jit(do_not_specialize=["T"])
def _rotate(
    q, k, cos, sin, q_token, q_head, k_token, k_head, stride, T,
    R: tl.constexpr, HALF: tl.constexpr, STYLE: tl.constexpr, INVERSE: tl.constexpr,
    Q: tl.constexpr, QB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """In place; what does not turn is not touched."""
    token, exists = _tokens(T, ROWS)
    ca, cb, sa, sb = _tables(cos, sin, token, exists, stride, R, HALF, STYLE, INVERSE)
    HALVES: tl.constexpr = STYLE == "half"
    head, real = _heads(Q, QB)
    at = q + token * q_token + head * q_head
    a, b = _pairs(at, exists & real, R, HALF, HALVES)
    a, b = _turn(a, b, ca, cb, sa, sb, R)
    _store(at, exists & real, a, b, a, R, R, HALF, 1, HALVES, INTERPRETED)
    head, real = _heads(K, KB)
    at = k + token * k_token + head * k_head
    a, b = _pairs(at, exists & real, R, HALF, HALVES)
    a, b = _turn(a, b, ca, cb, sa, sb, R)
    _store(at, exists & real, a, b, a, R, R, HALF, 1, HALVES, INTERPRETED)


@triton.jit(do_not_specialize=["T"])
def _gather(
    dq, dk, dv, cos, sin, out, q_token, q_head, k_token, k_head, v_token, v_head, stride, out_stride, T,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr, STYLE: tl.constexpr,
    Q: tl.constexpr, QB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """WHOLE: D rounded up, for dv, of which nothing turns."""
    token, exists = _tokens(T, ROWS)
    ca, cb, sa, sb = _tables(cos, sin, token, exists, stride, R, HALF, STYLE, True)
    HALVES: tl.constexpr = STYLE == "half"
    to = out + token * out_stride
    head, real = _heads(Q, QB)
    a, b, tail = _load(dq + token * q_token + head * q_head, exists & real, D, R, HALF, TAIL, HALVES)
    a, b = _turn(a, b, ca, cb, sa, sb, R)
    _store(to + head * D, exists & real, a, b, tail, D, R, HALF, TAIL, HALVES, INTERPRETED)
    head, real = _heads(K, KB)
    a, b, tail = _load(dk + token * k_token + head * k_head, exists & real, D, R, HALF, TAIL, HALVES)
    a, b = _turn(a, b, ca, cb, sa, sb, R)
    _store(to + (Q * D + head * D), exists & real, a, b, tail, D, R, HALF, TAIL, HALVES, INTERPRETED)
    a, b, tail = _load(dv + token * v_token + head * v_head, exists & real, D, 0, HALF, WHOLE, HALVES)
    _store(to + ((Q + K) * D + head * D), exists & real, a, b, tail, D, 0, HALF, WHOLE, HALVES, INTERPRETED)


@triton.jit
def _norm_turn(
    x, at, out, rstd, weight, alive, ca, cb, sa, sb, eps, OFFSET: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, HALVES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Heads at x + at, normed and turned, to `out`; their rstd to `rstd`."""
    a, b, tail = _load(x + at, alive, D, R, HALF, TAIL, HALVES)
    wa, wb, wt = _weights(weight, D, R, HALF, TAIL, HALVES, OFFSET)
    inverse = tl.rsqrt(_dot(a, b, tail, a, b, tail) / D + eps)
    tl.store(rstd, inverse, mask=alive)
    a, b = _turn(a * inverse * wa, b * inverse * wb, ca, cb, sa, sb, R)
    _store(out, alive, a, b, tail * inverse * wt, D, R, HALF, TAIL, HALVES, INTERPRETED)


@triton.jit(do_not_specialize=["T"])
def _norm_rotate(
    q, k, q_out, k_out, q_rstd, k_rstd, q_weight, k_weight, cos, sin, q_token, q_head, k_token, k_head, stride, T, eps,
    OFFSET: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr,
    Q: tl.constexpr, QB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    token, exists = _tokens(T, ROWS)
    ca, cb, sa, sb = _tables(cos, sin, token, exists, stride, R, HALF, STYLE, False)
    HALVES: tl.constexpr = STYLE == "half"
    head, real = _heads(Q, QB)
    number = token * Q + head
    _norm_turn(
        q, token * q_token + head * q_head, q_out + number * D, q_rstd + number, q_weight, exists & real, ca, cb, sa, sb, eps,
        OFFSET, D, R, HALF, TAIL, HALVES, INTERPRETED,
    )  # fmt: skip
    head, real = _heads(K, KB)
    number = token * K + head
    _norm_turn(
        k, token * k_token + head * k_head, k_out + number * D, k_rstd + number, k_weight, exists & real, ca, cb, sa, sb, eps,
        OFFSET, D, R, HALF, TAIL, HALVES, INTERPRETED,
    )  # fmt: skip


@triton.jit
def _norm_turn_back(
    d, x, rstd, weight, out, alive, ca, cb, sa, sb, OFFSET: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, HALVES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The mirror of `_norm_turn`: gradients at `d`, its inputs at `x`, result to `out`."""
    a, b, tail = _load(d, alive, D, R, HALF, TAIL, HALVES)
    xa, xb, xt = _load(x, alive, D, R, HALF, TAIL, HALVES)
    wa, wb, wt = _weights(weight, D, R, HALF, TAIL, HALVES, OFFSET)
    inverse = tl.load(rstd, mask=alive, other=0.0)
    a, b = _turn(a, b, ca, cb, sa, sb, R)
    a, b, tail = a * wa, b * wb, tail * wt
    xa, xb, xt = xa * inverse, xb * inverse, xt * inverse
    mean = _dot(a, b, tail, xa, xb, xt) / D
    a, b, tail = (a - xa * mean) * inverse, (b - xb * mean) * inverse, (tail - xt * mean) * inverse
    _store(out, alive, a, b, tail, D, R, HALF, TAIL, HALVES, INTERPRETED)


@triton.jit(do_not_specialize=["T"])
def _norm_gather(
    dq, dk, dv, q, k, q_rstd, k_rstd, q_weight, k_weight, cos, sin, out,
    dq_token, dq_head, dk_token, dk_head, v_token, v_head, q_token, q_head, k_token, k_head, stride, out_stride, T,
    OFFSET: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr,
    STYLE: tl.constexpr, Q: tl.constexpr, QB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    token, exists = _tokens(T, ROWS)
    ca, cb, sa, sb = _tables(cos, sin, token, exists, stride, R, HALF, STYLE, True)
    HALVES: tl.constexpr = STYLE == "half"
    to = out + token * out_stride
    head, real = _heads(Q, QB)
    _norm_turn_back(
        dq + token * dq_token + head * dq_head, q + token * q_token + head * q_head, q_rstd + token * Q + head, q_weight,
        to + head * D, exists & real, ca, cb, sa, sb, OFFSET, D, R, HALF, TAIL, HALVES, INTERPRETED,
    )  # fmt: skip
    head, real = _heads(K, KB)
    _norm_turn_back(
        dk + token * dk_token + head * dk_head, k + token * k_token + head * k_head, k_rstd + token * K + head, k_weight,
        to + (Q * D + head * D), exists & real, ca, cb, sa, sb, OFFSET, D, R, HALF, TAIL, HALVES, INTERPRETED,
    )  # fmt: skip
    a, b, tail = _load(dv + token * v_token + head * v_head, exists & real, D, 0, HALF, WHOLE, HALVES)
    _store(to + ((Q + K) * D + head * D), exists & real, a, b, tail, D, 0, HALF, WHOLE, HALVES, INTERPRETED)


@functools.cache
def _blocks(q: int, k: int, size: int, turning: int) -> dict[str, int]:
    """Sizes of pieces, rounded up."""
    up = triton.next_power_of_2
    return {
        "R": turning, "HALF": up(max(turning // 2, 1)), "TAIL": up(max(size - turning, 1)), "WHOLE": up(size),
        "Q": q, "QB": up(q), "K": k, "KB": up(k),
    }  # fmt: skip


@functools.cache
def tile_of(heads: int, size: int) -> Tile:
    """About 32 elements of the queries a thread."""
    block = triton.next_power_of_2(heads) * triton.next_power_of_2(size)
    rows = max(1024 // block, 1)
    return rows, min(max(rows * block // 1024, 1), 16)


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: Rotation,
    inverse: bool = False,
    tile: Tile | None = None,
) -> None:
    """See `halfbyte.kernels.rotary.rotate`. tile: measured otherwise."""
    length, heads, size = q.shape
    if rotation == "none" or not length:
        return
    assert cos is not None and sin is not None and cos.stride() == sin.stride()
    rows, warps = tile or tile_of(heads, size)
    b = _blocks(heads, k.shape[1], size, cos.shape[1])
    _rotate[(-(-length // rows),)](
        q, k, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), length,
        b["R"], b["HALF"], rotation, inverse, b["Q"], b["QB"], b["K"], b["KB"], rows, INTERPRETED,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def gather_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: Rotation,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """See `halfbyte.kernels.rotary.gather_backward`. tile: measured otherwise."""
    length, heads, size = dq.shape
    rows, warps = tile or tile_of(heads, size)
    assert cos is None or sin is None or cos.stride() == sin.stride()
    b = _blocks(heads, dk.shape[1], size, 0 if cos is None or rotation == "none" else cos.shape[1])
    if length:
        _gather[(-(-length // rows),)](
            dq, dk, dv, cos, sin, out, dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
            0 if cos is None else cos.stride(0), out.stride(0), length,
            size, b["R"], b["HALF"], b["TAIL"], b["WHOLE"], rotation, b["Q"], b["QB"], b["K"], b["KB"], rows, INTERPRETED,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def norm_rotate(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    spec: NormSpec,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: Rotation,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `halfbyte.kernels.rotary.norm_rotate`. tile: measured otherwise."""
    length, heads, size = q.shape
    rows, warps = tile or tile_of(heads, size)
    assert cos is None or sin is None or cos.stride() == sin.stride()
    b = _blocks(heads, k.shape[1], size, 0 if cos is None or rotation == "none" else cos.shape[1])
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_rstd, k_rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in (q, k))
    if length:
        _norm_rotate[(-(-length // rows),)](
            q, k, q_out, k_out, q_rstd, k_rstd, q_weight, k_weight, cos, sin,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), 0 if cos is None else cos.stride(0), length, spec.eps,
            spec.offset, size, b["R"], b["HALF"], b["TAIL"], rotation, b["Q"], b["QB"], b["K"], b["KB"], rows, INTERPRETED,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q_out, k_out, q_rstd, k_rstd


def norm_gather_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    spec: NormSpec,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: Rotation,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """See `halfbyte.kernels.rotary.norm_gather_backward`. tile: measured otherwise."""
    length, heads, size = dq.shape
    rows, warps = tile or tile_of(heads, size)
    assert cos is None or sin is None or cos.stride() == sin.stride()
    b = _blocks(heads, dk.shape[1], size, 0 if cos is None or rotation == "none" else cos.shape[1])
    if length:
        _norm_gather[(-(-length // rows),)](
            dq, dk, dv, q, k, q_rstd, k_rstd, q_weight, k_weight, cos, sin, out,
            dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), 0 if cos is None else cos.stride(0), out.stride(0), length,
            spec.offset, size, b["R"], b["HALF"], b["TAIL"], b["WHOLE"], rotation, b["Q"], b["QB"], b["K"], b["KB"], rows,
            INTERPRETED, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
