"""Attention as the formula says: softmax(cap · tanh(s q kᵀ / cap)) v, causal within each document, at most W keys back.

It is differentiable by autograd and runs everywhere; the methods are measured against it.

Letters: n tokens of one document, H query heads, G key/value heads, d head size, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def banded(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool `[queries, keys]`: causal, at most `window` keys back; the last query sees the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def repeat(x: Tensor, heads: int) -> Tensor:
    """`[.., G, n, d]` -> `[.., H, n, d]`."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """`[.., H, n, d]`, as many key heads; mask as SDPA takes it. Scores in fp32 or wider, one rounding at the end."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = cap * torch.tanh((q.to(exact) @ k.to(exact).transpose(-1, -2)) * (scale / cap))
    if mask is not None:
        # The minimum and not -inf: a padding token, which sees nothing, must not become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(exact).min) if mask.dtype == torch.bool else scores + mask
    return (torch.softmax(scores, -1) @ v.to(exact)).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None) -> Tensor:
    """Causal attention of one document, or of several of equal length: q `[.., H, n, d]`, k and v `[.., G, n, d]`."""
    n, heads = q.shape[-2], q.shape[-3]
    k, v = repeat(k, heads), repeat(v, heads)
    mask = banded(n, n, window, q.device) if cap is not None or (window is not None and window < n) else None
    if cap is not None:
        return capped(q, k, v, mask, scale, cap)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
