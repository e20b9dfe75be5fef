"""Attention over documents as the formula says, one document at a time: softmax(cap · tanh(s q kᵀ / cap)) v, causal, windowed.

Why: it runs everywhere (CPU, fp32, any head size), and every other method is measured against it. Cost: one SDPA a document
forward, and forward and backward of it again in the backward pass; with a soft cap, the scores of one document in fp32.

Letters: T tokens, n tokens of one document, H query heads, G key/value heads, d head size, W window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from halfbyte.kernels.attention.documents import Documents


def banded(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool `[queries, keys]`: causal, at most `window` keys back; the last query sees the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """`[.., H, n, d]` with as many key heads; scores and softmax in fp32 (or wider), one rounding at the end."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = cap * torch.tanh((q.to(exact) @ k.to(exact).transpose(-1, -2)) * (scale / cap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (torch.softmax(scores, -1) @ v.to(exact)).to(q.dtype)


def document(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None) -> Tensor:
    """Causal attention of one or more documents of n tokens: q `[.., n, H, d]`, k and v `[.., n, G, d]` -> `[.., n, H, d]`."""
    n, share = q.shape[-3], q.shape[-2] // k.shape[-2]
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    if share > 1:
        k, v = k.repeat_interleave(share, -3), v.repeat_interleave(share, -3)
    mask = banded(n, n, window, q.device) if cap is not None or (window is not None and window < n) else None
    if cap is not None:
        return capped(q, k, v, mask, scale, cap).transpose(-3, -2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(-3, -2)


@dataclass(frozen=True)
class Sdpa:
    """The method `sdpa`: documents in a loop, or as one batch when they are equally long."""

    name: str = "sdpa"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out `[T, H, d]` contiguous; nothing is kept for backward."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        with torch.no_grad():
            for o, *qkv in _pieces(documents, out, q, k, v):
                o.copy_(document(*qkv, scale, window, cap))
        return out, ()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        residuals: tuple[Tensor, ...],
        documents: Documents,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq `[T, H, d]`, dk, dv `[T, G, d]`, contiguous."""
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for do, dq, dk, dv, *qkv in _pieces(documents, dout, *grads, q, k, v):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in qkv]
                o = document(leaves[0], leaves[1], leaves[2], scale, window, cap)
            for target, grad in zip((dq, dk, dv), torch.autograd.grad(o, leaves, do), strict=True):
                target.copy_(grad)
        return grads[0], grads[1], grads[2]


def _pieces(documents: Documents, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors `[T, ..]` cut into documents; equally long ones come as one piece `[D, n, ..]`."""
    if documents.equal is not None:
        return [tuple(x.unflatten(0, (documents.equal, -1)) for x in tensors)]  # type: ignore[no-untyped-call]
    lengths = list(documents.read_lengths())
    return list(zip(*(x.split(lengths) for x in tensors), strict=True))  # type: ignore[no-untyped-call]
