"""The method `sdpa`: documents one by one through torch's own attention, or as one batch when they are equally long.

Why: it runs everywhere (CPU, fp32, any head size, with a soft cap). Cost: a few launches a document. On a CPU without a cap,
the explicit kernel pair of torch, nothing twice; elsewhere backward runs the forward again, and a soft cap holds the scores of
one document in fp32.

Letters: T tokens, n tokens of one document, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.attention import reference
from halfbyte.kernels.attention.documents import Documents

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Sdpa:
    """Keeps for backward: on a CPU without a cap the log-sum-exp `[H, T]`, elsewhere nothing."""

    name: str = "sdpa"

    @property
    def holds_operands(self) -> bool:
        """No: the log-sum-exp is its own."""
        return False

    def obstacle(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, cap: float | None) -> str | None:
        """None: there is nothing that it cannot do."""
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out `[T, H, d]` contiguous, and the residuals."""
        window = documents.window(window)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        explicit = q.device.type == "cpu" and cap is None
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32)) if explicit else None
        with torch.no_grad():
            for piece in _pieces(documents):
                target, *qkv = (_cut(x, piece) for x in (out, q, k, v))
                if lse is None:
                    target.copy_(reference.attention(qkv[0], qkv[1], qkv[2], scale, window, cap))
                else:
                    mask = _mask(target, window)
                    found, norms = _cpu(*_repeated(*qkv), 0.0, mask is None, attn_mask=mask, scale=scale)
                    target.copy_(found)
                    _cut_lse(lse, piece).copy_(norms)
        return out, () if lse is None else (lse,)

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
        window = documents.window(window)
        targets = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for piece in _pieces(documents):
            do, o, *qkv = (_cut(x, piece) for x in (dout, out, q, k, v))
            if residuals:
                mask, lse = _mask(o, window), _cut_lse(residuals[0], piece)
                grads = _cpu_backward(do, *_repeated(*qkv), o, lse, 0.0, mask is None, attn_mask=mask, scale=scale)
            else:
                grads = _again(do, qkv, scale, window, cap)
            for target, grad in zip(targets, grads, strict=True):
                _cut(target, piece).copy_(_summed(grad, target.shape[1]))
        return targets[0], targets[1], targets[2]


def _again(do: Tensor, qkv: list[Tensor], scale: float, window: int | None, cap: float | None) -> tuple[Tensor, ...]:
    """Gradients by running the forward once more."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in qkv)
        return torch.autograd.grad(reference.attention(q, k, v, scale, window, cap), (q, k, v), do)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, reference.repeat(k, q.shape[-3]), reference.repeat(v, q.shape[-3])


def _mask(o: Tensor, window: int | None) -> Tensor | None:
    """Additive `[n, n]` of o's dtype, for a window."""
    if window is None:
        return None
    n = o.shape[-2]
    allowed = reference.banded(n, n, window, o.device)
    return torch.zeros(n, n, dtype=o.dtype, device=o.device).masked_fill_(~allowed, float("-inf"))


def _summed(grad: Tensor, heads: int) -> Tensor:
    """`[D, H, n, d]` -> `[D, G, n, d]`: the mirror of `reference.repeat`."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)  # type: ignore[no-untyped-call]


Piece = tuple[int, int, int]
"""First token, documents, tokens of each."""


def _pieces(documents: Documents) -> list[Piece]:
    """One piece a document; equally long ones are one piece."""
    lengths = documents.read_lengths()
    if documents.equal:
        return [(0, documents.equal, lengths[0])]
    starts = itertools.accumulate(lengths, initial=0)
    return [(at, 1, n) for at, n in zip(starts, lengths, strict=False)]


def _cut(x: Tensor, piece: Piece) -> Tensor:
    """`[T, h, d]` -> `[D, h, n, d]`, a view."""
    at, count, n = piece
    return x[at : at + count * n].unflatten(0, (count, n)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]


def _cut_lse(x: Tensor, piece: Piece) -> Tensor:
    """`[H, T]` -> `[D, H, n]`, a view."""
    at, count, n = piece
    return x[:, at : at + count * n].unflatten(1, (count, n)).transpose(0, 1)  # type: ignore[no-untyped-call, no-any-return]
