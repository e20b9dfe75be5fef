"""The reference: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ and its derivatives, written down.

Letters: T = tokens, K = input features, N = output features, r = rank. x `[T, K]`, w `[N, K]`, a `[r, K]`, b `[N, r]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.dequantize import reference as dequantize
from halfbyte.kernels.dropout import Dropout
from halfbyte.kernels.dropout import reference as dropout
from halfbyte.kernels.lora_linear.members import Member


def weight_of(weight: Packed | Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight `[N, K]`."""
    return dequantize.decode_new(weight, dtype) if isinstance(weight, Packed) else weight.to(dtype)


def drop(x: Tensor, mask: Dropout | None, layer: int) -> Tensor:
    """drop(x) `[T, K]`; the same mask again for the same arguments."""
    return x if mask is None else dropout.dropout(x, mask.state, mask.p, mask.tokens, layer)


def forward(x: Tensor, group: list[Member], mask: Dropout | None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs y_i `[T, N_i]`, and drop(x) A_iᵀ `[T, r_i]` of those with an adapter."""
    ys, xas = [], []
    for m in group:
        y = x @ weight_of(m.weight, x.dtype).T
        if m.bias is not None:
            y = y + m.bias.to(x.dtype)
        if m.lora is not None:
            xa = drop(x, mask, m.lora.layer) @ m.lora.a.to(x.dtype).T
            y = y + m.lora.scale * (xa @ m.lora.b.to(x.dtype).T)
            xas.append(xa)
        ys.append(y)
    return ys, xas


def backward(
    dys: list[Tensor], x: Tensor | None, group: list[Member], mask: Dropout | None, want_x: bool, want_a: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """dx = Σ dy W + drop(s · dy B A), and the dA = (s · dy B)ᵀ drop(x); each only if wanted."""
    dx, das = None, []
    for dy, m in zip(dys, group, strict=True):
        if want_x:
            dx = dy @ weight_of(m.weight, dy.dtype) + (0 if dx is None else dx)
        if m.lora is None:
            continue
        dyb = m.lora.scale * (dy @ m.lora.b.to(dy.dtype))
        if dx is not None:
            dx = dx + drop(dyb @ m.lora.a.to(dy.dtype), mask, m.lora.layer)
        if want_a and x is not None:
            das.append((dyb.T @ drop(x, mask, m.lora.layer)).to(m.lora.a.dtype))
    return dx, das


def grad_b(dys: list[Tensor], xas: list[Tensor], group: list[Member]) -> list[Tensor]:
    """dB = s · dyᵀ drop(x) Aᵀ."""
    adapted = [(dy, m.lora) for dy, m in zip(dys, group, strict=True) if m.lora is not None]
    return [(lora.scale * (dy.T @ xa)).to(lora.b.dtype) for (dy, lora), xa in zip(adapted, xas, strict=True)]


def grad_weight(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dW = dyᵀ x, of a dense weight."""
    return (dy.T @ x).to(dtype)
