"""What a fused layer asks of the device, call by call, so that the table of launches cannot rot.

Counted are the calls of our kernels and of the library's products, and every operation of torch between them that would launch
something. Not visible here, and added on a GPU: a fill and a reduction beside each product that cuBLAS splits (five of a layer's
products at 8B), and what the attention library launches beside its two kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.kernels import attention, fp8, norm, products, rotary
from halfbyte.kernels.augmented import Group
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.forward import hidden_states
from halfbyte.layers.fused import gradients, projection
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, OFFLOADED, Keep
from halfbyte.layers.fused.prepare import prepare
from halfbyte.optim.flat import flatten
from layers.families import LENGTHS, learned, row

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "view", "slice", "as_strided", "t", "unsqueeze",
        "transpose", "select", "alias", "detach", "expand", "_unsafe_view", "permute", "split", "unflatten", "resize")  # fmt: skip
"""Operations that launch nothing."""

FORWARD = {"decode": 4, "product": 9, "norm": 2, "rotary": 1, "attention": 1, "glu": 1, "torch clone": 1}
BACKWARD = {"decode": 4, "product": 8, "dA": 4, "dB": 2, "norm": 2, "rotary": 1, "attention": 1, "glu": 1}
AGAIN = {"decode": 3, "product": 7, "norm": 2, "rotary": 1, "attention": 1}
"""What full recompute adds: the forward but for glu and down."""


class Launches(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.inside and name not in FREE:
            self.counts[f"torch {name}"] += 1
        return func(*args, **(kwargs or {}))

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as one launch, whatever it does inside on this device."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.counts[name] += 1
            self.inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False

        return counted


class _Attention:
    holds_operands = False

    def __init__(self, launches: Launches, method: Any) -> None:
        self.forward, self.backward = (launches.of("attention", f) for f in (method.forward, method.backward))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    for owner, attribute, name in (
        (products, "matmul", "product"),
        (projection, "outer", "dA"),
        (gradients, "outer", "dB"),
        (fp8, "add_norm", "norm"),
        (norm, "norm_backward", "norm"),
        (fp8, "glu", "glu"),
        (fp8, "glu_backward", "glu"),
        (rotary, "rotate", "rotary"),
        (rotary, "gather_backward", "rotary"),
        (Group, "matrix", "decode"),
    ):
        monkeypatch.setattr(owner, attribute, found.of(name, getattr(owner, attribute)))
    chosen = attention.method
    monkeypatch.setattr(attention, "method", lambda *args: _Attention(found, chosen(*args)))
    return found


def _model(keep: Keep) -> tuple[torch.nn.Module, lora.Adapter]:
    model, adapter = learned(AdapterConfig(rank=4))
    flatten(adapter.parameters())
    prepare(model, keep, in_place=True)
    return model, adapter


def _counts(launches: Launches, keep: Keep, wants_x: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Of the forward and the backward of one layer, as a run calls it."""
    model, _ = _model(keep)
    layer = next(m for m in model.modules() if isinstance(m, DecoderLayer))
    call: dict[str, Any] = {}
    hook = layer.register_forward_pre_hook(lambda m, args, kwargs: call.update(kwargs, x=args[0]), with_kwargs=True)
    ids, positions, bounds = row(LENGTHS)
    with torch.no_grad():
        hidden_states(model, ids, positions, bounds)
    hook.remove()
    x = call.pop("x").detach().requires_grad_(wants_x)
    launches.counts.clear()
    with launches:
        out = layer(x, **call)
        out = out[0] if isinstance(out, tuple) else out
        forward = dict(launches.counts)
        launches.counts.clear()
        # A gradient as the norm behind hands it down.
        handed = layer.fused.room.leave(torch.randn(x.numel() // 64, 64 + layer.fused.parts.down.rank), 64)  # type: ignore[union-attr]
        launches.counts.clear()
        learning = [p for p in layer.parameters() if p.requires_grad]
        torch.autograd.grad(out, [x] if wants_x else learning, handed.view(out.shape), allow_unused=True)
    return forward, dict(launches.counts)


def test_a_layer_that_keeps_everything(launches: Launches) -> None:
    forward, backward = _counts(launches, EVERYTHING, wants_x=True)
    assert forward == FORWARD and backward == BACKWARD
    assert sum(forward.values()) + sum(backward.values()) == 42


def test_full_recompute(launches: Launches) -> None:
    forward, backward = _counts(launches, INPUTS, wants_x=True)
    assert forward == FORWARD
    assert backward == dict(Counter(BACKWARD) + Counter(AGAIN))
    assert sum(forward.values()) + sum(backward.values()) == 56


def test_offloaded(launches: Launches) -> None:
    """Norms, gate and up are made again; the XA of q/k/v outlives its buffer."""
    forward, backward = _counts(launches, OFFLOADED, wants_x=True)
    assert forward == FORWARD | {"torch clone": 2}
    assert backward == dict(Counter(BACKWARD) + Counter({"decode": 1, "product": 2, "norm": 2}))


def test_the_first_layer_makes_no_gradient_of_its_input(launches: Launches) -> None:
    """The embedding is frozen: neither the product with q, k and v nor the norm's backward runs."""
    forward, backward = _counts(launches, EVERYTHING, wants_x=False)
    assert forward == FORWARD
    assert backward == BACKWARD | {"product": 7, "norm": 1}


def test_a_step_hands_nothing_to_the_embedding(launches: Launches) -> None:
    """Two layers and the norm behind them, from the model's forward to the adapters' gradients."""
    model, adapter = _model(EVERYTHING)
    hidden = hidden_states(model, *row(LENGTHS))
    launches.counts.clear()
    with launches:
        hidden.backward(torch.ones_like(hidden))
    assert launches.counts["product"] == 2 * BACKWARD["product"] - 1
    assert launches.counts["norm"] == 2 * BACKWARD["norm"] - 1 + 1
    assert all(p.grad is not None for _, p, _ in adapter.parameters())
