"""Rotary positions as they are written down, fp32 inside (float64 for float64), one rounding at the end.

    half                  y[i] = x[i] c[i] - x[i + r/2] s[i],    y[i + r/2] = x[i + r/2] c[i + r/2] + x[i] s[i + r/2],    i < r/2
    interleaved           y[2i] = x[2i] c[2i] - x[2i+1] s[2i],   y[2i+1] = x[2i+1] c[2i+1] + x[2i] s[2i+1]
    interleaved-halves    the same with c[i], s[i] for both of the pair: tables in the order of `half`
    none                  y = x

The inverse is the transposed map. For the usual tables, alike for both of a pair, that is sin -> -sin; a scale in them stays.
Letters: T tokens, d head size, r <= d elements that turn.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from halfbyte.kernels.norm.reference import NormSpec, factor, wide

Rotation = Literal["half", "interleaved", "interleaved-halves", "none"]


def turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, rotation: Rotation, inverse: bool = False) -> Tensor:
    """x `[T, n, d]` turned, in fp32."""
    x = wide(x)
    if rotation == "none":
        return x
    assert cos is not None and sin is not None
    size = cos.shape[-1]
    if rotation == "interleaved-halves":
        cos, sin = (t[:, : size // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turning, still = x[..., :size], x[..., size:]
    first, second = (slice(0, size // 2), slice(size // 2, None)) if rotation == "half" else (slice(0, None, 2), slice(1, None, 2))
    a, b = turning[..., first], turning[..., second]
    y = torch.empty_like(turning)
    if inverse:
        y[..., first] = a * cos[..., first] + b * sin[..., second]
        y[..., second] = b * cos[..., second] - a * sin[..., first]
    else:
        y[..., first] = a * cos[..., first] - b * sin[..., first]
        y[..., second] = b * cos[..., second] + a * sin[..., second]
    return torch.cat((y, still), dim=-1)


def rotate(q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, rotation: Rotation, inverse: bool = False) -> None:
    """See `halfbyte.kernels.rotary.rotate`."""
    q.copy_(turned(q, cos, sin, rotation, inverse))
    k.copy_(turned(k, cos, sin, rotation, inverse))


def gather_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, rotation: Rotation, out: Tensor
) -> None:
    """See `halfbyte.kernels.rotary.gather_backward`."""
    back = (turned(dq, cos, sin, rotation, inverse=True), turned(dk, cos, sin, rotation, inverse=True), wide(dv))
    out.copy_(torch.cat(back, dim=1).flatten(1))


def _normed(x: Tensor, weight: Tensor, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """x `[T, n, d]` normed by head, in fp32, and rstd `[T, n]`."""
    x = wide(x)
    rstd = torch.rsqrt(x.square().mean(-1) + spec.eps)
    return x * rstd[..., None] * factor(weight, spec, x), rstd


def norm_rotate(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    spec: NormSpec,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: Rotation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `halfbyte.kernels.rotary.norm_rotate`."""
    (normed_q, q_rstd), (normed_k, k_rstd) = _normed(q, q_weight, spec), _normed(k, k_weight, spec)
    q_out, k_out = turned(normed_q, cos, sin, rotation), turned(normed_k, cos, sin, rotation)
    return q_out.to(q.dtype), k_out.to(k.dtype), q_rstd, k_rstd


def _norm_back(d: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, spec: NormSpec) -> Tensor:
    """The gradient d `[T, n, d]` (fp32) of the normed x as that of x."""
    unit = wide(x) * rstd[..., None]
    g = d * factor(weight, spec, d)
    return (g - unit * (g * unit).mean(-1, keepdim=True)) * rstd[..., None]


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
) -> None:
    """See `halfbyte.kernels.rotary.norm_gather_backward`."""
    back_q = _norm_back(turned(dq, cos, sin, rotation, inverse=True), q, q_rstd, q_weight, spec)
    back_k = _norm_back(turned(dk, cos, sin, rotation, inverse=True), k, k_rstd, k_weight, spec)
    out.copy_(torch.cat((back_q, back_k, wide(dv)), dim=1).flatten(1))
