"""The attention function "halfbyte", plugged into transformers' public registry: packed rows without a dense mask.

Why: a packed row holds many examples that must not see each other. A dense mask costs tokens² bytes and the fast kernels;
detecting boundaries from position ids leaks under several settings. Here the boundaries are an explicit argument, `documents`,
and every example is causal on its own. How it runs is chosen in `halfbyte.kernels.attention`; rows without boundaries
(generation, padded batches) and attention dropout run on torch's own attention.

Letters: B rows, S tokens, H query heads, G key/value heads, d head size, W sliding window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from halfbyte.errors import ModelError
from halfbyte.kernels.attention import Documents, attend
from halfbyte.kernels.attention.reference import banded, capped, repeat

NAME = "halfbyte"

# What would change the mathematics and is not built: a value other than None is refused, never dropped.
REFUSED = ("s_aux", "position_bias", "head_mask")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    cu_seqlens: Tensor | None = None,
    boundaries: tuple[int, ...] | None = None,
    longest: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query `[B, H, S, d]`, key and value `[B, G, S', d]`; returns `[B, S, H, d]` and no weights.

    documents: the packed form, B = 1; `attention_mask` is then a mere marker and ignored. Or as their parts: `cu_seqlens` int32
    `[D+1]`, 0 first and S last; `boundaries`, the same on the host; `longest`, tokens of the longest. softcap: scores become
    softcap · tanh(score / softcap). Raises ModelError for an argument that would change the mathematics (sinks, position bias).
    """
    for name in REFUSED:
        if others.get(name) is not None:
            raise ModelError(f"attention argument `{name}` is not built into the halfbyte attention", code="attention.argument")
    if documents is None and cu_seqlens is not None:
        documents = Documents(cu_seqlens, boundaries, longest if longest is not None else query.shape[2])
    if documents is None:
        causal = bool(others["is_causal"]) if others.get("is_causal") is not None else bool(getattr(module, "is_causal", True))
        return _plain(query, key, value, attention_mask, dropout, scaling, sliding_window, softcap, causal), None
    if dropout:
        return _dropped(query, key, value, documents, dropout, scaling, sliding_window, softcap), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attend(q, k, v, documents, scale, sliding_window, softcap).unsqueeze(0), None


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    window: int | None,
    cap: float | None,
    causal: bool,
) -> Tensor:
    """Unpacked rows: prefill, decoding with a cache, or one document; the mask, if any, already holds the window."""
    queries, keys = query.shape[2], key.shape[2]
    key, value = repeat(key, query.shape[1]), repeat(value, query.shape[1])
    needed = cap is not None or (window is not None and keys > window) or 1 < queries < keys
    if mask is None and causal and needed:
        mask = banded(queries, keys, window, query.device)
    if cap is not None:
        if dropout:
            raise ModelError("attention dropout together with a soft cap is not built", code="attention.argument")
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return capped(query, key, value, mask, scale, cap).transpose(1, 2).contiguous()
    is_causal = causal and mask is None and queries > 1
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scaling)
    return out.transpose(1, 2).contiguous()


def _dropped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """Packed rows with attention dropout, which no method has: document by document through torch's own."""
    lengths = list(documents.read_lengths())
    pieces = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_plain(q, k, v, None, dropout, scaling, window, cap, True) for q, k, v in pieces], dim=1)


def register() -> None:
    """Makes "halfbyte" known to transformers: the function, and SDPA's masks for unpacked calls (generation, padded batches)."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
