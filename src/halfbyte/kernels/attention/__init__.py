"""`attention`: causal attention within the documents of packed rows, forward and backward, by the best method at hand.

Why plain functions with an explicit backward (`method`): the hand-written layer calls them between its own products and decides
itself what is kept. `attend` is the same for autograd. A method is chosen by rules and a measurement (`choice.py`):

    cudnn   documents of one length, 16 bits, no window         CUDA
    flash   any documents and windows, 16 bits                  CUDA
    flex    soft caps too, any head size that is a power of 2   CUDA, compiled
    sdpa    everything, document by document                    anywhere
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.attention.choice import method
from halfbyte.kernels.attention.documents import Documents, Wanted
from halfbyte.kernels.attention.protocol import Method

__all__ = ["Documents", "Method", "Wanted", "attend", "method"]


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None) -> Tensor:
    """out `[T, H, d]` contiguous, differentiable: q `[T, H, d]`, k and v `[T, G, d]`, strided views with last stride 1.

    Under autocast they are cast to its dtype, as torch does for its own attention.
    """
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
        with torch.autocast(kind, enabled=False):
            return attend(q, k, v, documents, scale, window, cap)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _Attention.apply(q, k, v, documents, scale, window, cap)  # type: ignore[no-untyped-call]
        return out
    return method(q, k, v, documents, scale, window, cap).forward(q, k, v, documents, scale, window, cap)[0]


class _Attention(torch.autograd.Function):
    """`method` for autograd: keeps q, k, v, out and the method's residuals."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        chosen = method(q, k, v, documents, scale, window, cap)
        out, residuals = chosen.forward(q, k, v, documents, scale, window, cap)
        ctx.save_for_backward(q, k, v, out, *residuals)
        ctx.chosen, ctx.arguments = chosen, (documents, scale, window, cap)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        q, k, v, out, *residuals = ctx.saved_tensors
        return (*ctx.chosen.backward(grads[0], q, k, v, out, tuple(residuals), *ctx.arguments), None, None, None, None)
