"""Attention's backward a few heads at a time, for very long rows: its workspace is then that of those heads alone.

Why: heads do not know of each other, so their gradients are the same whichever run together, and in a long row a few already fill
a GPU. What the libraries take besides (dq in fp32, dk and dv once for every query head) is 32 KB a token of an 8B, more than
anything else in backward; of four heads it is 4 KB. It also keeps counts of the libraries below 2^31 for longer.
Cost: each part of q, k, v, out and dout is copied to be contiguous, some 0.1 % of backward at this length.

Letters: T tokens, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LONG = 16384
"""Tokens of a microbatch from which on heads are parted."""
FILLS = 1 << 17
"""Tokens times query heads that run together, at least; and never fewer heads than AT_ONCE."""
AT_ONCE = 4


@dataclass(frozen=True)
class Part:
    """Query heads `first` to `last`, and the key/value heads that they read."""

    first: int
    last: int
    kv_first: int
    kv_last: int


Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Part], tuple[Tensor, Tensor, Tensor]]
"""dout, q, k, v and out of a part (contiguous where there are several), and the part -> dq, dk, dv of it."""


def together(tokens: int, heads: int, kv_heads: int) -> int:
    """Key/value heads whose backward runs at once in a row of so many tokens."""
    wanted = max(AT_ONCE, -(-FILLS // tokens)) if tokens >= LONG else heads
    return min(kv_heads, -(-wanted * kv_heads // heads))


def query_heads(tokens: int, heads: int, kv_heads: int) -> int:
    """Query heads whose backward runs at once: those that read these key/value heads."""
    return together(tokens, heads, kv_heads) * heads // kv_heads


def parts(tokens: int, heads: int, kv_heads: int) -> list[Part]:
    """All heads, in parts that run one after another."""
    share, step = heads // kv_heads, together(tokens, heads, kv_heads)
    ends = [(g, min(g + step, kv_heads)) for g in range(0, kv_heads, step)]
    return [Part(g * share, end * share, g, end) for g, end in ends]


def overflow(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why kernels with 32-bit offsets cannot read them, or None. Of v too: where a norm made q and k anew, v alone is still a view
    of the wide buffer, and spans many times what they span."""
    step = max(x.stride(0) for x in (q, k, v))
    return f"{q.shape[0]} tokens of {step} numbers overflow 32-bit offsets" if q.shape[0] * step >= 2**31 else None


def in_parts(run: Backward, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq `[T, H, d]`, dk, dv `[T, G, d]`, part by part; where all heads are one part, just as `run` gives them."""
    whole = parts(q.shape[0], q.shape[1], k.shape[1])
    if len(whole) == 1:
        return run(dout, q, k, v, out, whole[0])
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for part in whole:
        ours, kv = slice(part.first, part.last), slice(part.kv_first, part.kv_last)
        ours_of = [x[:, ours].contiguous() for x in (dout, q, out)]
        grads = run(ours_of[0], ours_of[1], k[:, kv].contiguous(), v[:, kv].contiguous(), ours_of[2], part)
        for target, grad in zip((dq[:, ours], dk[:, kv], dv[:, kv]), grads, strict=True):
            target.copy_(grad)
        del grads, grad, ours_of  # or they are there while the next part runs
    return dq, dk, dv
