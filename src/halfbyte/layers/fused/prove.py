"""The proof that a fused layer is the layer: output and all gradients against its modules, on the model's own first activations.

Cost: two forwards and backwards of a few tokens for each kind of layer. It runs on the device and with the kernels of the run, so
that what would be a wrong gradient there is found before the first step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused.layer import Fused
from halfbyte.layers.structure import NotUnderstood

# Relative Frobenius errors: summation in another order, and in 16 bits intermediate results rounded at other places.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
TOLERANCE_16 = 0.05


def prove(layer: DecoderLayer, fused: Fused, captured: dict[str, Any]) -> None:
    """Raises NotUnderstood where the two disagree. captured: how the model calls the layer (`probe.capture_calls`)."""
    call = {name: value for name, value in captured.items() if name != "args"}
    call |= dict(zip(("hidden_states", *layer.structure.arguments), captured["args"], strict=False))
    hidden: Tensor = call.pop("hidden_states").detach()
    call["attention_mask"] = None
    tokens = hidden.shape[1]
    middle = tokens // 3
    call["boundaries"] = (0, middle, tokens)
    call["cu_seqlens"] = torch.tensor(call["boundaries"], dtype=torch.int32, device=hidden.device)
    call["longest"] = tokens - middle
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    before = layer.fused, layer.gradient_checkpointing
    try:
        layer.fused, layer.gradient_checkpointing = None, False
        expected = _run(layer, hidden, call, grad)
        layer.fused = fused
        got = _run(layer, hidden, call, grad)
    finally:
        layer.fused, layer.gradient_checkpointing = before
    # Four products follow each other; what they cannot say in fp8 is no fault of the layer.
    tolerance = TOLERANCE.get(hidden.dtype, TOLERANCE_16) + 4 * fused.products.error
    for name, ours in got.items():
        ours, theirs = ours.float(), expected[name].float()
        # What the layer adds to its input; gradients of a fresh adapter's A are zero because its B is.
        base = hidden.detach().float() if name == "output" else torch.zeros_like(theirs)
        error = float((ours - theirs).norm() / (theirs - base).norm().clamp_min(1e-20))
        if not error <= tolerance:
            raise NotUnderstood(f"the fused {name} differs from the modules' by {error:.2g}")


def _run(layer: DecoderLayer, hidden: Tensor, call: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    learning = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        x = hidden.detach().clone().requires_grad_()
        out = layer.forward(x, **call)
        out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(out, [x, *learning.values()], grad)
    return {"output": out.detach()} | {f"gradient of {name}": g for name, g in zip(("the input", *learning), grads, strict=True)}
