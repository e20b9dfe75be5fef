"""The proof that a fused layer is the layer: output and all gradients, on the model's own first activations.

A fused layer may be as wrong as its modules are, no more: truth is the modules in fp32, and the fused error at most twice
theirs. In 16 bits that matters, since gradients of q and k are differences of large numbers: there both are off by 5 to 20 percent,
and of a few tokens' rounding either may come out several times as wrong as the other. So a proof that fails is drawn again, with
other places for the tokens and another gradient: what is wrong fails every time, an unlucky draw does not.
Cost: three forwards and backwards of a few tokens, and one layer in fp32, for each kind of layer. It runs on the device and with
the kernels of the run, so that what would be a wrong gradient there is found before the first step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.attention import Documents
from halfbyte.layers import probe
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused.layer import Fused
from halfbyte.layers.structure import NotUnderstood

# Relative Frobenius errors that are allowed beside twice the modules': summation in another order.
FLOOR = {torch.float64: 1e-8, torch.float32: 1e-3}
FLOOR_16 = 0.01
DRAWS = 4
NARROW = ("output", "gradient of the input")
"""What products in fp8 are compared on: the rest is proven in 16 bits, and in fp8 amplified as the gradients of q and k are."""


def prove(layer: DecoderLayer, fused: Fused, captured: dict[str, Any]) -> None:
    """Raises NotUnderstood where it does not hold. captured: how the model calls the layer (`probe.capture_calls`)."""
    call = {name: value for name, value in captured.items() if name != "args"}
    call |= dict(zip(("hidden_states", *layer.structure.arguments), captured["args"], strict=False))
    hidden: Tensor = call.pop("hidden_states").detach()
    call["attention_mask"] = None
    tokens = hidden.shape[1]
    call["documents"] = Documents.of(torch.tensor([0, tokens // 3, tokens], dtype=torch.int32), hidden.device, tokens)
    for draw in range(DRAWS):
        grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(draw)).to(hidden)
        try:
            _prove(layer, fused, call, hidden.roll(draw, 1), grad)
        except NotUnderstood:
            if draw == DRAWS - 1:
                raise
        else:
            return


def _prove(layer: DecoderLayer, fused: Fused, call: dict[str, Any], hidden: Tensor, grad: Tensor) -> None:
    before = layer.fused, layer.gradient_checkpointing
    products = fused.products
    try:
        layer.fused, layer.gradient_checkpointing = None, False
        honest = _run(layer, hidden, call, grad)
        truth = _truth(layer, hidden, call, grad)
        layer.fused, fused.exact = fused, True
        _compare(_run(layer, hidden, call, grad), honest, truth, hidden, FLOOR.get(hidden.dtype, FLOOR_16))
        if products.exact is not products:
            fused.exact = False
            got = _run(layer, hidden, call, grad)
            # Four products follow each other; what they cannot say in fp8 is no fault of the layer.
            _compare({name: got[name] for name in NARROW}, honest, truth, hidden, FLOOR_16 + 4 * products.error)
    finally:
        fused.exact = False
        layer.fused, layer.gradient_checkpointing = before


def _compare(got: dict[str, Tensor], honest: dict[str, Tensor], truth: dict[str, Tensor], hidden: Tensor, floor: float) -> None:
    for name, ours in got.items():
        # Of the output, what the layer adds to its input counts. A fresh adapter's A has no gradient, because its B is zero.
        size = truth[name] - hidden.float() if name == "output" else truth[name]
        unit = size.norm().clamp_min(1e-20)
        error, theirs = (float((t.float() - truth[name]).norm() / unit) for t in (ours, honest[name]))
        if not error <= 2 * theirs + floor:
            raise NotUnderstood(f"the fused {name} is off by {error:.2g}, the modules' by {theirs:.2g}")


def _truth(layer: DecoderLayer, hidden: Tensor, call: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """The modules in fp32."""
    exact = probe.fp32_copy(layer)
    assert isinstance(exact, DecoderLayer)
    return _run(exact, hidden.float(), {name: probe.to_fp32(value) for name, value in call.items()}, grad.float())


def _run(layer: DecoderLayer, hidden: Tensor, call: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    learning = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        x = hidden.detach().clone().requires_grad_()
        out = layer.forward(x, **call)
        out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(out, [x, *learning.values()], grad)
    return {"output": out.detach()} | {f"gradient of {name}": g for name, g in zip(("the input", *learning), grads, strict=True)}
