"""`dropout`: a mask that is a function of (seed, step, row, layer, element), never stored.

Why: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter into random bits, so
the backward pass, a recomputed forward, another device and another microbatch size all see the same mask.

    key      (seed low, seed high)
    counter  (element / 4, row, layer, step), its four words serve four neighbouring elements
    row      first_row + position // tokens;   element = (position % tokens) * K + k
    keep     word >= round(p * 2^32);  y = x / (1 - p) where kept, else 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.dropout import reference


@dataclass(frozen=True)
class Dropout:
    """Which mask: Philox(seed, step, row, layer, element), the same whatever the microbatch is.

    p: probability of zero, 0 <= p < 1. state: int64 `[3]` on the device: seed, step, first row of this microbatch.
    tokens: row length. start: positions of the microbatch that stand before the first one given.
    """

    p: float
    state: Tensor
    tokens: int
    start: int = 0


def apply(xs: list[Tensor], mask: Dropout, layer: int) -> list[Tensor]:
    """`dropout` below the operator: the same mask on several tensors `[T, K]`."""
    if twin(xs[0].device) == "fused":
        from halfbyte.kernels.dropout import fused

        return [fused.dropout(x, mask.state, mask.p, mask.tokens, layer, mask.start) for x in xs]
    keep = reference.keep_from(mask.start, (xs[0].shape[0], xs[0].shape[1]), mask.state, mask.p, mask.tokens, layer)
    return [reference.masked(x, keep, mask.p) for x in xs]


@torch.library.custom_op("halfbyte::dropout", mutates_args=())
def dropout_op(x: Tensor, state: Tensor, p: float, tokens: int, layer: int) -> Tensor:
    """x `[..., K]` with its mask applied."""
    return apply([x.reshape(-1, x.shape[-1])], Dropout(p, state, tokens), layer)[0].view(x.shape)


@dropout_op.register_fake
def _(x: Tensor, state: Tensor, p: float, tokens: int, layer: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, float, int, int], output: Tensor) -> None:
    _, state, *rest = inputs
    ctx.save_for_backward(state)
    ctx.rest = rest  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (state,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return dropout_op(grad, state, *ctx.rest), None, None, None, None  # type: ignore[attr-defined]


dropout_op.register_autograd(_backward, setup_context=_setup)


def dropout(x: Tensor, mask: Dropout, layer: int) -> Tensor:
    """x `[..., K]` with its mask applied; T = x.numel() / K positions are numbered in order."""
    dropped: Tensor = dropout_op(x, mask.state, mask.p, mask.tokens, layer)
    return dropped
