"""The layer as one node of autograd.

Saved through autograd, so that an overwritten tensor is an error and never a wrong gradient: the input, the adapters, the stored
weights. The activations between are the node's own (`Activations`): backward writes over them, so it runs once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.layers.fused import host
from halfbyte.layers.fused.backward import backward
from halfbyte.layers.fused.forward import Activations, Call, forward
from halfbyte.layers.fused.gradients import Gradients

MOVABLE = {
    "x": ("x",),
    "normed": ("normed", "normed_mlp"),
    "qkv": ("qkv", "q", "k"),
    "attended": ("attended",),
    "mid": ("mid", "attended_raw"),
    "inputs": ("inputs", "mlp_raw"),
}
"""Fields of `Activations` that can wait elsewhere, by the name that `Keep` has for them: those of the tokens' size."""


class Layer(torch.autograd.Function):
    """(x `[T, H]`, call, learning parameters, stored tensors) -> output `[T, H]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, learning: int, *tensors: Tensor) -> Tensor:
        """tensors: the `learning` parameters that learn, then stored weights."""
        out, a = forward(call, x)
        ctx.away = None
        if call.keep.away:
            fields = [field for name, these in MOVABLE.items() if name in call.keep.away for field in these]
            ctx.away_names = [field for field in fields if getattr(a, field) is not None]
            ctx.away = host.send([getattr(a, name) for name in ctx.away_names])
            for name in ctx.away_names:
                setattr(a, name, None)
        a.x = None
        ctx.call, ctx.activations, ctx.learning = call, a, learning
        ctx.save_for_backward(x if call.keep.here("x") else None, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        a: Activations | None = ctx.activations
        if a is None:
            raise ModelError(
                "a fused layer's backward ran twice; it writes over what it kept",
                hint="run forward again, or switch the fused layers off (layers.fused.remove)",
                code="model.backward-twice",
            )
        a.x = x
        if ctx.away is None:
            host.ahead(grad.device)
        else:
            for name, tensor in zip(ctx.away_names, ctx.away.fetch(), strict=True):
                setattr(a, name, tensor)
        ctx.activations = ctx.away = None
        gradients = Gradients(ctx.call.in_place)
        dx = backward(ctx.call, a, grad, gradients, ctx.needs_input_grad[0])
        found = [gradients.found.get(id(t)) for t in tensors[: ctx.learning]]
        return dx, None, None, *found, *[None] * (len(tensors) - ctx.learning)
