"""Whatever a layer keeps, here or in host memory, and however its MLP is cut: the same outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.layers import forward
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, NAMES, OFFLOADED, Keep, keeping
from halfbyte.layers.fused.prepare import prepare, set_keep
from layers.families import NF4, pair, row

LENGTHS = (7, 16, 1, 10)
PLACES = ("keep", "offload", "recompute")


def placed(*places: str, x: str = "keep") -> Keep:
    """A `Keep` by the place of each name."""
    by_name = dict(zip(NAMES, places, strict=True))
    away = [name for name, place in by_name.items() if place == "offload"] + (["x"] if x == "offload" else [])
    return keeping([name for name, place in by_name.items() if place != "recompute"], away)


COMBINATIONS = [placed(*p, x=PLACES[i % 2]) for i, p in enumerate(itertools.product(PLACES, repeat=len(NAMES)))]


def model_of(family: str, dropout: float) -> tuple[torch.nn.Module, lora.Adapter]:
    still = {"gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}
    model, _ = pair(family, NF4, **still.get(family, {}))
    adapter = lora.attach(model, AdapterConfig(rank=4, dropout=dropout), seed=1)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.normal_(0, 0.1, generator=torch.Generator().manual_seed(layer.number))
    adapter.set_dropout_state(5, 2, 0, tokens=17)
    return model.train(), adapter


def gradients(model: torch.nn.Module, adapter: lora.Adapter) -> tuple[Tensor, dict[str, Tensor]]:
    for _, p, _ in adapter.parameters():
        p.grad = None
    hidden = forward.hidden_states(model, *row(LENGTHS))
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    (hidden * weight).sum().backward()
    return hidden.detach(), {name: p.grad for name, p, _ in adapter.parameters()}


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_every_place_of_everything_gives_the_same_bits(family: str) -> None:
    """3^5 combinations, on both layers a different one; with dropout."""
    model, adapter = model_of(family, 0.2)
    assert prepare(model).layers == 2
    hidden, expected = gradients(model, adapter)
    step = 1 if family == "qwen3" else 7
    for first, second in zip(COMBINATIONS[::step], COMBINATIONS[5::step], strict=False):
        set_keep(model, [first, second])
        got_hidden, got = gradients(model, adapter)
        assert torch.equal(got_hidden, hidden)
        assert all(torch.equal(got[name], grad) for name, grad in expected.items()), (first, second)


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "falcon", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tile", [5, 17, 64])
def test_tiles_give_the_same_rows(family: str, dropout: float, tile: int) -> None:
    """Outputs and gradients up to the order of sums (fp32); tiles that begin in the middle of a row of dropout's numbering too."""
    model, adapter = model_of(family, dropout)
    assert prepare(model).layers == 2
    hidden, expected = gradients(model, adapter)
    for names in ((), ("normed", "qkv", "attended", "mid"), ("attended",)):
        set_keep(model, [keeping(names, tile=tile), keeping(names, away=names, tile=tile)])
        got_hidden, got = gradients(model, adapter)
        torch.testing.assert_close(got_hidden, hidden, atol=1e-5, rtol=1e-5)
        for name, grad in expected.items():
            assert (got[name] - grad).abs().max() <= 2e-5 * grad.abs().max(), name


def test_each_layer_has_its_own() -> None:
    model, _ = model_of("llama", 0.0)
    prepare(model, [INPUTS, EVERYTHING])
    layers = [m.fused for m in model.modules() if isinstance(m, DecoderLayer)]
    assert [one.keep for one in layers] == [INPUTS, EVERYTHING]
    set_keep(model, OFFLOADED)
    assert [one.keep for one in layers] == [OFFLOADED, OFFLOADED]


def test_what_waits_must_be_kept() -> None:
    with pytest.raises(AssertionError, match="what waits in host memory is kept"):
        keeping(("qkv",), away=("mid",))
    with pytest.raises(AssertionError, match="no gate and up"):
        keeping(NAMES, tile=128)
