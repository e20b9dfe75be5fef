"""The attention function "halfbyte", plugged into transformers' public registry: packed rows without a dense mask.

Why: a packed row holds many examples that must not see each other. A dense mask costs tokens² bytes and the fast kernels;
detecting boundaries from position ids leaks under several settings. Here the boundaries are an explicit argument,
`cu_seqlens`, and every example is causal on its own. The method is chosen by `choose`, logged once with its reason.
Cost: the document loop is one kernel launch an example; the variable-length kernel and the batched form are one launch a row.

Letters: B rows, S tokens, H query heads, G key/value heads, d head size, D documents, W sliding window.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from halfbyte.errors import ModelError

NAME = "halfbyte"
log = logging.getLogger("halfbyte")

# What would change the mathematics and is not built: a value other than None is refused, never dropped.
REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")


@dataclass(frozen=True)
class Choice:
    """How attention runs (`sdpa`, `sdpa-batched`, `varlen`, `sdpa-loop`) and why."""

    name: str
    reason: str


def choose(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...] | None, dropout: float, window: int | None, head_size: int
) -> Choice:
    """The method for packed rows; `lengths` are the documents' tokens when they are known on the host, without the empty ones."""
    if lengths is not None and len(set(lengths)) == 1:
        return Choice("sdpa-batched", f"all {len(lengths)} documents have {lengths[0]} tokens")
    if device == "cuda":
        obstacle = _varlen_obstacle(dtype, dropout, window, head_size)
        if obstacle is None:
            return Choice("varlen", "documents of several lengths, 16-bit, on CUDA")
        return Choice("sdpa-loop", f"no variable-length kernel: {obstacle}")
    return Choice("sdpa-loop", f"documents of several lengths on {device}")


@functools.lru_cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_obstacle(dtype: torch.dtype, dropout: float, window: int | None, head_size: int) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs 16 bits, not {dtype}"
    if dropout:
        return "it has no dropout"
    if head_size % 8 or head_size > 256:
        return f"head size {head_size}"
    if window is not None and "window_size" not in _varlen_parameters():
        return "this torch's has no sliding window"
    return None


@functools.lru_cache
def _announce(choice: Choice) -> None:
    log.info("attention: %s (auto: %s)", choice.name, choice.reason)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,
    boundaries: tuple[int, ...] | None = None,
    longest: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query `[B, H, S, d]`, key and value `[B, G, S', d]`; returns `[B, S, H, d]` and no weights.

    cu_seqlens: int32 `[D+1]`, 0 first and S last, B = 1: the packed form; `attention_mask` is then a mere marker and ignored.
    boundaries: the same numbers on the host, if the caller has them (saves a device sync). longest: tokens of the longest document.
    Raises ModelError for an argument that would change the mathematics (soft cap, sinks, position bias).
    """
    for name in REFUSED:
        if others.get(name) is not None:
            raise ModelError(f"attention argument `{name}` is not built into the halfbyte attention", code="attention.argument")
    if cu_seqlens is None:
        causal = bool(others["is_causal"]) if others.get("is_causal") is not None else bool(getattr(module, "is_causal", True))
        return _plain(query, key, value, attention_mask, dropout, scaling, sliding_window, causal), None
    if sliding_window is not None and sliding_window >= (longest if longest is not None else query.shape[2]):
        sliding_window = None
    return _packed(query, key, value, dropout, scaling, sliding_window, cu_seqlens, boundaries, longest), None


def _repeat(x: Tensor, heads: int) -> Tensor:
    """`[B, G, S, d]` -> `[B, H, S, d]`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def banded(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool `[queries, keys]`: causal, at most `window` keys back; the last query sees the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> Tensor:
    """Unpacked rows: prefill, decoding with a cache, or one document; the mask, if any, already holds the window."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and causal and ((window is not None and keys > window) or 1 < queries < keys):
        mask = banded(queries, keys, window, query.device)
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    is_causal = causal and mask is None and queries > 1
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scaling)
    return out.transpose(1, 2).contiguous()


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    cu_seqlens: Tensor,
    boundaries: tuple[int, ...] | None,
    longest: int | None,
) -> Tensor:
    lengths = None if boundaries is None else lengths_of(boundaries)
    choice = choose(query.device.type, query.dtype, lengths, dropout, window, query.shape[-1])
    _announce(choice)
    if choice.name == "varlen":
        return _varlen(query, key, value, scaling, window, cu_seqlens, longest or query.shape[2])
    if lengths is None:
        lengths = lengths_of(tuple(cu_seqlens.tolist()))
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    if choice.name == "sdpa-batched":
        shape = (query.shape[1], len(lengths), lengths[0], query.shape[-1])
        q, k, v = (x[0].reshape(shape).transpose(0, 1) for x in (query, key, value))
        return _plain(q, k, v, None, dropout, scaling, window, True).flatten(0, 1).unsqueeze(0)
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_plain(q, k, v, None, dropout, scaling, window, True) for q, k, v in pieces], dim=1)


def lengths_of(boundaries: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens of each document, empty ones left out."""
    return tuple(b - a for a, b in itertools.pairwise(boundaries) if b > a)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, cu_seqlens: Tensor, longest: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def register() -> None:
    """Makes "halfbyte" known to transformers: the function, and SDPA's masks for unpacked calls (generation, padded batches)."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
