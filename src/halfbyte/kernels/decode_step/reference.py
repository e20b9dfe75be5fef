"""The same in plain torch, fp32 inside, one rounding at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.norm import NormSpec, add_norm
from halfbyte.kernels.norm.reference import wide
from halfbyte.kernels.rotary.reference import Rotation, turned


@dataclass(frozen=True)
class Heads:
    """A layer's attention as numbers. scale: of the scores. window: places seen, the token's own included. cap: soft cap of scores.

    q_weight, k_weight: of the norm of each head (`spec`), `[d]`; None without.
    """

    query: int
    kv: int
    size: int
    scale: float
    window: int | None
    cap: float | None
    rotation: Rotation
    spec: NormSpec | None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None


@dataclass(frozen=True)
class Scratch:
    """What the pieces leave for the one that joins them. partial: fp32 `[M, H, S, d]`; tops: fp32 `[M, H, 2, S]`, maxima and sums;
    counters: int32 `[M, G]`, pieces done: zero before and after a launch."""

    partial: Tensor
    tops: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, rows: int, heads: int, kv: int, size: int, pieces: int, device: torch.device) -> Scratch:
        """pieces: a power of two."""
        counters = torch.zeros(rows, kv, dtype=torch.int32, device="cpu").to(device)
        return cls(
            torch.empty(rows, heads, pieces, size, device=device), torch.empty(rows, heads, 2, pieces, device=device), counters
        )


PIECES = 128
"""Of a row of scores: about one a multiprocessor of a large GPU."""


@dataclass(frozen=True)
class Tops:
    """What the pieces of each row leave for the one that joins them. values: fp32 `[M, PIECES]`; places: their columns, int32;
    counters: int32 `[M]`, pieces done: zero before and after a launch."""

    values: Tensor
    places: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Tops:
        counters = torch.zeros(rows, dtype=torch.int32, device="cpu").to(device)
        places = torch.empty(rows, PIECES, dtype=torch.int32, device=device)
        return cls(torch.empty(rows, PIECES, device=device), places, counters)


def likeliest(scores: Tensor, out: Tensor) -> None:
    """See the package."""
    torch.argmax(scores, -1, out=out)


def normalise(x: Tensor, spec: NormSpec, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """out = norm(x)."""
    add_norm(x, None, spec, weight, bias, out)


def _normed(x: Tensor, spec: NormSpec | None, weight: Tensor | None) -> Tensor:
    x = wide(x)
    if spec is None:
        return x
    y = torch.empty_like(x)
    add_norm(x.flatten(0, 1), None, spec, weight, None, y.flatten(0, 1))
    return y


def attend(
    qkv: Tensor, position: Tensor, heads: Heads, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor, out: Tensor,
    feed: Tensor | None = None, fed: Tensor | None = None,
) -> None:  # fmt: skip
    """See the package."""
    query, key, value = qkv.unflatten(1, (-1, heads.size)).split([heads.query, heads.kv, heads.kv], dim=1)  # type: ignore[no-untyped-call]
    cos, sin = (None if t is None else t[position] for t in (cos, sin))
    rows = torch.arange(len(qkv), device=qkv.device)
    keys[rows, position] = turned(_normed(key, heads.spec, heads.k_weight), cos, sin, heads.rotation).to(keys.dtype)
    values[rows, position] = value.to(values.dtype)
    q = turned(_normed(query, heads.spec, heads.q_weight), cos, sin, heads.rotation).to(keys.dtype)
    place_P = torch.arange(keys.shape[1], device=q.device)[None]
    seen = place_P <= position[:, None]
    if heads.window is not None:
        seen &= place_P > position[:, None] - heads.window
    # Places that were never written may hold anything.
    k, v = (torch.where(seen[:, :, None, None], wide(t), 0.0).repeat_interleave(heads.query // heads.kv, 2) for t in (keys, values))
    scores = torch.einsum("mhd,mphd->mhp", wide(q), k) * heads.scale
    if heads.cap:
        scores = heads.cap * torch.tanh(scores / heads.cap)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    out.copy_(torch.einsum("mhp,mphd->mhd", scores.softmax(-1), v).flatten(1))
    if feed is not None and fed is not None:
        by_head = wide(feed).unflatten(1, (heads.query, heads.size))  # type: ignore[no-untyped-call]
        fed[:, : len(out)] = torch.einsum("mhd,rhd->hmr", wide(out).unflatten(1, (heads.query, -1)), by_head)  # type: ignore[no-untyped-call]
