"""Layers of one model that keep, compute again and send different things: the gradients of those that keep everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.adapters.config import AdapterConfig
from halfbyte.layers import forward
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, OFFLOADED, Keep, keeping
from halfbyte.layers.fused.prepare import prepare
from halfbyte.memory.rungs import Rung
from halfbyte.train import fusing
from layers.families import NF4, adapted, pair, row

LAYERS = 7
GATE_AND_UP = keeping(("qkv", "mid", "inputs"), away=("mid", "inputs"))
MIXES = [
    (OFFLOADED, 3, GATE_AND_UP),
    (GATE_AND_UP, 5, keeping(("qkv", "mid", "inputs"), away=("qkv",))),
    (GATE_AND_UP, 2, EVERYTHING),
    (EVERYTHING, 1, keeping(("qkv", "attended", "mid", "inputs"), away=("x", "qkv", "attended", "mid", "inputs"))),
    (INPUTS, 4, keeping((), away=("x",))),
]
"""The lean layers, how many, the others."""


def gradients(model: PreTrainedModel, device: str) -> tuple[Tensor, list[Tensor]]:
    ids, positions, bounds = row((5, 9, 3))
    hidden = forward.hidden_states(model, ids.to(device), positions.to(device), bounds)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4)).to(device)
    learning = [p for p in model.parameters() if p.requires_grad]
    return hidden.detach(), list(torch.autograd.grad((hidden * weight).sum(), learning))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: f"{mix[0].spec()}, {mix[1]}, {mix[2].spec()}")
def test_spread_layers_give_the_same_bits(mix: tuple[Keep, int, Keep], device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, _ = pair("llama", NF4, num_hidden_layers=LAYERS)
    adapted(model, AdapterConfig(rank=4))
    model.to(device)
    assert not prepare(model).left
    expected_hidden, expected = gradients(model, device)
    lean, count, rest = mix
    rung = Rung(1, True, lean=lean.spec(), lean_layers=count, rest=rest.spec())
    assert {keep.spec() for keep in rung.keeps(LAYERS)} == {lean.spec(), rest.spec()}
    fusing.use(model, rung)
    for _ in range(2):  # the second takes the host buffers that the first gave back
        hidden, found = gradients(model, device)
        assert torch.equal(hidden, expected_hidden)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
