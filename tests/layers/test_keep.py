"""Whatever a layer keeps, here or in host memory, and however its MLP is cut: the same outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from halfbyte.adapters.config import AdapterConfig
from halfbyte.kernels import attention
from halfbyte.kernels.attention import flex
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused import host
from halfbyte.layers.fused.forward import Activations
from halfbyte.layers.fused.host import send
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, NAMES, OFFLOADED, Keep, keeping
from halfbyte.layers.fused.prepare import prepare, set_keep
from kernels.checks_attention import flex_by_definition
from layers.families import NF4, adapted, gradients_of, hidden_of, learned, pair

PLACES = ("keep", "offload", "recompute")


def placed(*places: str, x: str = "keep") -> Keep:
    """A `Keep` by the place of each name."""
    by_name = dict(zip(NAMES, places, strict=True))
    away = [name for name, place in by_name.items() if place == "offload"] + (["x"] if x == "offload" else [])
    return keeping([name for name, place in by_name.items() if place != "recompute"], away)


COMBINATIONS = [placed(*p, x=PLACES[i % 2]) for i, p in enumerate(itertools.product(PLACES, repeat=len(NAMES)))]


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_every_place_of_everything_gives_the_same_bits(family: str) -> None:
    """3^5 combinations, on both layers a different one; with dropout."""
    model, adapter = learned(AdapterConfig(rank=4, dropout=0.2), family)
    assert prepare(model).layers == 2
    hidden, expected = gradients_of(model, adapter)
    step = 1 if family == "qwen3" else 7
    for first, second in zip(COMBINATIONS[::step], COMBINATIONS[5::step], strict=False):
        set_keep(model, [first, second])
        got_hidden, got = gradients_of(model, adapter)
        assert torch.equal(got_hidden, hidden)
        assert all(torch.equal(got[name], grad) for name, grad in expected.items()), (first, second)


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "falcon", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tile", [5, 17, 64])
def test_tiles_give_the_same_rows(family: str, dropout: float, tile: int) -> None:
    """Outputs and gradients up to the order of sums (fp32); tiles that begin in the middle of a row of dropout's numbering too."""
    model, adapter = learned(AdapterConfig(rank=4, dropout=dropout), family)
    assert prepare(model).layers == 2
    hidden, expected = gradients_of(model, adapter)
    for names in ((), ("normed", "qkv", "attended", "mid"), ("attended",)):
        set_keep(model, [keeping(names, tile=tile), keeping(names, away=names, tile=tile)])
        got_hidden, got = gradients_of(model, adapter)
        torch.testing.assert_close(got_hidden, hidden, atol=1e-5, rtol=1e-5)
        for name, grad in expected.items():
            assert (got[name] - grad).abs().max() <= 2e-5 * grad.abs().max(), name


def _activations(hidden: Tensor) -> list[Activations]:
    """Of the fused layers in the graph of `hidden`, from the last one on."""
    found, seen, todo = [], set(), [hidden.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
            found += [node.activations] if isinstance(getattr(node, "activations", None), Activations) else []  # type: ignore[attr-defined]
    return found


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_graph_of_attention_holds_nothing_that_is_not_kept_here(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flex` leaves views of q, k, v and its output: with them all of qkv would stay on the device, wherever a copy waits."""
    model, adapter = learned(AdapterConfig(rank=4), family)
    prepare(model)
    hidden, expected = gradients_of(model, adapter)
    monkeypatch.setattr(flex, "_function", lambda compiled: flex_by_definition)
    monkeypatch.setattr(attention, "method", lambda *_: flex.Flex())
    kept = (EVERYTHING, INPUTS, OFFLOADED, keeping(("attended",)), keeping(("qkv",)), keeping(("qkv", "attended"), ("attended",)))
    for keep in (*kept, keeping(("qkv", "attended"), ("qkv",))):
        set_keep(model, keep)
        layers = _activations(hidden_of(model))
        assert len(layers) == 2
        for a in layers:
            assert bool(a.residuals) is (keep == EVERYTHING), keep
            here = {t.untyped_storage().data_ptr() for t in (a.qkv, a.q, a.k) if t is not None}
            assert {t.untyped_storage().data_ptr() for t in a.residuals[1:]} <= here
        got_hidden, got = gradients_of(model, adapter)
        torch.testing.assert_close(got_hidden, hidden, atol=1e-5, rtol=1e-5)
        for name, grad in expected.items():
            assert (got[name] - grad).abs().max() <= 2e-5 * grad.abs().max(), (keep, name)


@pytest.mark.cpu
@pytest.mark.parametrize("adapters", [[2, 3], [1], [0]], ids=str)
def test_below_the_lowest_adapter_nothing_is_kept_or_sent(adapters: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No backward comes to fetch it: each microbatch would leave its own in host memory. Layers above pass a gradient on."""
    model, _ = pair("llama", NF4, num_hidden_layers=4)
    targets = rf".*layers\.[{''.join(map(str, adapters))}]\..*_proj"
    adapter = adapted(model, AdapterConfig(rank=4, targets=targets))
    assert prepare(model).layers == 4
    hidden, expected = gradients_of(model, adapter)
    set_keep(model, OFFLOADED)
    sent: list[host.Away] = []
    monkeypatch.setattr(host, "send", lambda tensors: sent.append(send(tensors)) or sent[-1])
    got_hidden, got = gradients_of(model, adapter)
    assert len(sent) == 4 - min(adapters)
    assert torch.equal(got_hidden, hidden) and got.keys() == expected.keys()
    assert all(torch.equal(got[name], grad) and grad.any() for name, grad in expected.items())


def test_each_layer_has_its_own() -> None:
    model, _ = learned(AdapterConfig(rank=4, dropout=0.0), "llama")
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
