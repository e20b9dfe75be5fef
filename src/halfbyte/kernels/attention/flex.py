"""The method `flex`: torch's flex_attention, compiled, with a block mask made from the boundaries.

Why: it is the only fused kernel in torch with a soft cap. Cost: compiling takes tens of seconds for each shape, soft cap and
window, so it runs only where nothing else can, or where it is asked for. The block mask costs a few small launches a
microbatch, never tokens² memory.

Letters: T tokens, N = ceil(T / 128) blocks, H query heads, G key/value heads, d head size, W window.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.attention import heads
from halfbyte.kernels.attention.documents import Documents

BLOCK = 128


@dataclass(frozen=True)
class Flex:
    """Keeps for backward autograd's graph, and in it the log-sum-exp. compiled: False runs the eager form, for tests on a CPU."""

    name: str = "flex"
    compiled: bool = True

    @property
    def holds_operands(self) -> bool:
        """Yes, in the graph."""
        return True

    def obstacle(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, cap: float | None) -> str | None:
        """Why it cannot run, or None."""
        size = q.shape[2]
        if q.device.type != "cuda":
            return f"it needs CUDA, not {q.device.type}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if size < 16 or size & (size - 1):
            return f"head size {size} is not a power of two from 16 on"
        return heads.overflow(q, k, v)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out `[T, H, d]` contiguous; the residuals are out and q, k, v again, with autograd's graph between them."""
        if not self.compiled:
            with torch.no_grad():
                return self.run(q, k, v, documents, scale, window, cap).contiguous(), ()
        residuals = self._graph(q, k, v, documents, scale, window, cap)
        return residuals[0].detach().contiguous(), residuals

    def _graph(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> tuple[Tensor, ...]:
        """out and leaves that share memory with q, k and v; with the graph even where no gradient follows: without, flex would be
        compiled once more."""
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
            return self.run(leaves[0], leaves[1], leaves[2], documents, scale, window, cap), *leaves

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
        """dq `[T, H, d]`, dk, dv `[T, G, d]`. Runs the forward again where the graph was lost or dropped."""
        if not residuals or residuals[0].grad_fn is None:
            residuals = self._graph(q, k, v, documents, scale, window, cap)
        grads = torch.autograd.grad(residuals[0], residuals[1:], dout)
        dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        return dq, dk, dv

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """out `[T, H, d]`, differentiable by autograd."""
        window = documents.window(window)
        mask = documents.keep(("flex", window), lambda: block_mask(documents.cu_seqlens, q.shape[0], window))
        by_heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        function = _function(self.compiled)
        out = function(*by_heads, score_mod=_capped(cap), block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        found: Tensor = out[0].transpose(0, 1)
        return found


@functools.lru_cache
def _function(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    plain: Any = flex_attention
    return torch.compile(plain, dynamic=False) if compiled else plain


@functools.lru_cache
def _capped(cap: float | None) -> Callable[..., Tensor] | None:
    """One function a cap: torch compiles again for another object."""
    if cap is None:
        return None

    def score(value: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(value / cap)

    return score


def first_keys(cu_seqlens: Tensor, tokens: int, window: int | None) -> Tensor:
    """int64 `[T]`: the first key that each token sees; it never falls from one token to the next."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position.to(cu_seqlens.dtype), right=True)
    first = cu_seqlens[document].long()
    return first if window is None else torch.maximum(first, position - (window - 1))


def blocks(first: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the `[N, N]` blocks are seen in part, and which in full, of `first_keys` `[T]`."""
    tokens, device = len(first), first.device
    count = -(-tokens // BLOCK)
    tops = torch.arange(count, device=device) * BLOCK
    bottoms = (tops + BLOCK - 1).clamp_max(tokens - 1)
    key = tops[None, :]
    seen = (key <= tops[:, None]) & (key + BLOCK > first[tops][:, None])
    full = (key < tops[:, None]) & (key >= first[bottoms][:, None])
    return seen & ~full, full


def block_mask(cu_seqlens: Tensor, tokens: int, window: int | None) -> Any:
    """The BlockMask of causal documents, built from the boundaries alone, without waiting for the device."""
    from torch.nn.attention.flex_attention import BlockMask

    first = first_keys(cu_seqlens, tokens, window)

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[query])

    partly, full = blocks(first)
    (some, some_numbers), (all_, all_numbers) = _listed(partly), _listed(full)
    return BlockMask.from_kv_blocks(some, some_numbers, all_, all_numbers, BLOCK, allowed, (tokens, tokens))


def _listed(kind: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row are in, and their numbers, those first: int32 `[1, 1, N]` and `[1, 1, N, N]`."""
    numbers = torch.argsort(kind.to(torch.int8), dim=1, descending=True, stable=True)
    return kind.sum(1, dtype=torch.int32)[None, None], numbers.to(torch.int32)[None, None]
