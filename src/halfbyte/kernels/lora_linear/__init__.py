"""`lora_linear`: y_i = x W_iᵀ + b_i + s_i · drop(x) A_iᵀ B_iᵀ for a group of weights that share their input.

Why a group: q, k and v (gate and up) read the same x, so their A's run as one product and dx is summed in place. Why one operator:
what backward needs of a weight is saved packed, through `save_for_backward`, so a weight overwritten between forward and backward
is an error of autograd's version counter, and never a silent wrong gradient; the decoded weight lives for one GEMM.
Cost: forward and backward each decode every weight once. Kept for backward, besides the stored tensors: x if an A or a dense
weight learns, and x Aᵀ `[T, r]` a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.dropout import Dropout
from halfbyte.kernels.lora_linear import fused, reference
from halfbyte.kernels.lora_linear.members import LowRank, Member, deal, describe

__all__ = ["Dropout", "LowRank", "lora_linear"]


def _mask(state: Tensor | None, p: float, tokens: int) -> Dropout | None:
    return None if state is None or p == 0.0 else Dropout(p, state, tokens)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.library.custom_op("halfbyte::lora_linear", mutates_args=())
def lora_linear_op(
    x: Tensor,
    packed: list[Tensor],
    dense: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    state: Tensor | None,
    members: str,
    p: float,
    tokens: int,
) -> list[Tensor]:
    """All y_i `[..., N_i]`, then all drop(x) A_iᵀ `[T, r_i]`. `members`: see `members.describe`."""
    group = deal(members, packed, dense, biases, a, b)
    which = reference if twin(x.device) == "reference" else fused
    xas: list[Tensor]
    ys, xas = which.forward(_rows(x), group, _mask(state, p, tokens))
    # Not `view`: models that add into a linear layer's output in place (Falcon) must not meet a view of this operator's making.
    return [torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]]) for y in ys] + xas


@lora_linear_op.register_fake
def _(
    x: Tensor,
    packed: list[Tensor],
    dense: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    state: Tensor | None,
    members: str,
    p: float,
    tokens: int,
) -> list[Tensor]:
    group = deal(members, packed, dense, biases, a, b)
    positions = x.numel() // x.shape[-1]
    ys = [x.new_empty(*x.shape[:-1], m.weight.shape[0]) for m in group]
    return ys + [x.new_empty(positions, m.lora.a.shape[0]) for m in group if m.lora is not None]


@torch.library.custom_op("halfbyte::lora_linear_backward", mutates_args=())
def lora_linear_backward_op(
    grads: list[Tensor],
    x: Tensor | None,
    xas: list[Tensor],
    packed: list[Tensor],
    dense: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    state: Tensor | None,
    members: str,
    p: float,
    tokens: int,
    wants: list[bool],
) -> list[Tensor]:
    """The wanted gradients in the order x, dense, biases, a, b. wants: x, any a, any b, each dense one, each bias.

    x is needed for gradients of a and of dense weights only.
    """
    group = deal(members, packed, dense, biases, a, b)
    which = reference if twin(grads[0].device) == "reference" else fused
    dys = [_rows(grad) for grad in grads]
    x_TK = None if x is None else _rows(x)
    das: list[Tensor]
    dx, das = which.backward(dys, x_TK, group, _mask(state, p, tokens), wants[0], wants[1])
    out: list[Tensor] = [] if dx is None else [dx.view(*grads[0].shape[:-1], dx.shape[1])]
    want_dense, want_bias = iter(wants[3 : 3 + len(dense)]), iter(wants[3 + len(dense) :])
    for dy, m in zip(dys, group, strict=True):
        if isinstance(m.weight, Tensor) and next(want_dense) and x_TK is not None:
            out.append(which.grad_weight(dy, x_TK, m.weight.dtype))
    for dy, m in zip(dys, group, strict=True):
        if m.bias is not None and next(want_bias):
            out.append(dy.sum(0, dtype=torch.float32).to(m.bias.dtype))
    return out + das + (which.grad_b(dys, xas, group) if wants[2] else [])


@lora_linear_backward_op.register_fake
def _(
    grads: list[Tensor],
    x: Tensor | None,
    xas: list[Tensor],
    packed: list[Tensor],
    dense: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    state: Tensor | None,
    members: str,
    p: float,
    tokens: int,
    wants: list[bool],
) -> list[Tensor]:
    width = deal(members, packed, dense, biases, a, b)[0].weight.shape[1]
    out = [grads[0].new_empty(*grads[0].shape[:-1], width)] if wants[0] else []
    frozen = [*dense, *biases]
    out += [torch.empty_like(t) for t, want in zip(frozen, wants[3:], strict=True) if want]
    return out + [torch.empty_like(t) for t in [*(a if wants[1] else []), *(b if wants[2] else [])]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, packed, dense, biases, a, b, state, members, p, tokens = inputs
    xas = output[len(output) - len(a) :]
    ctx.mark_non_differentiable(*xas)
    wants = [x.requires_grad, *(any(t.requires_grad for t in ts) for ts in (a, b))]
    wants += [t.requires_grad for t in (*dense, *biases)]
    lists = (packed, dense, biases, a, b, xas if wants[2] else [])
    ctx.sizes = [len(ts) for ts in lists]
    ctx.rest = (members, p, tokens, wants)
    keep_x = wants[1] or any(wants[3 : 3 + len(dense)])
    ctx.save_for_backward(x if keep_x else None, state, *(t for ts in lists for t in ts))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, state, *flat = ctx.saved_tensors
    pieces = iter(flat)
    packed, dense, biases, a, b, xas = ([next(pieces) for _ in range(size)] for size in ctx.sizes)
    members, p, tokens, wants = ctx.rest
    dys = grads[: len(grads) - len(a)]
    found = iter(lora_linear_backward_op(dys, x, xas, packed, dense, biases, a, b, state, members, p, tokens, wants))
    dx = next(found) if wants[0] else None
    rest = [next(found) if want else None for want in wants[3:]]
    das = [next(found) if wants[1] else None for _ in a]
    dbs = [next(found) if wants[2] else None for _ in b]
    return dx, [None] * len(packed), rest[: len(dense)], rest[len(dense) :], das, dbs, None, None, None, None


lora_linear_op.register_autograd(_backward, setup_context=_setup)


def lora_linear(
    x: Tensor,
    weights: list[Packed | Tensor],
    biases: list[Tensor | None],
    loras: list[LowRank | None],
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """x `[..., K]` in the compute dtype; returns one `[..., N_i]` a weight, in the dtype of x.

    Gradients flow to x, dense weights, biases, A and B, each in its own dtype; packed weights are frozen.
    """
    group = [Member(w, bias, lora) for w, bias, lora in zip(weights, biases, loras, strict=True)]
    adapters = [m.lora for m in group if m.lora is not None]
    outputs: list[Tensor] = lora_linear_op(
        x,
        [t for m in group if isinstance(m.weight, Packed) for t in m.weight.tensors()],
        [m.weight for m in group if isinstance(m.weight, Tensor)],
        [m.bias for m in group if m.bias is not None],
        [lora.a for lora in adapters],
        [lora.b for lora in adapters],
        None if dropout is None else dropout.state,
        describe(group),
        0.0 if dropout is None else dropout.p,
        0 if dropout is None else dropout.tokens,
    )
    return outputs[: len(group)]
