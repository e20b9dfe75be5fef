"""Weights inside the matrices of their groups: the same bits, the same names, nothing stored twice; and what a layer notices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.formats.packed import Format
from halfbyte.kernels.augmented import Group
from halfbyte.kernels.products import Augmented, Float8
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused.layer import Fused
from halfbyte.layers.fused.prepare import prepare, remove
from halfbyte.train.fusing import exact
from layers.families import NF4, gradients_of, hidden_of, learned, pair

NONE = pytest.param(None, id="none")


def _model(family: str, fmt: Format | None, config: AdapterConfig | None = None) -> tuple[nn.Module, lora.Adapter]:
    return learned(config or AdapterConfig(rank=4), family, fmt)


def _groups(model: nn.Module) -> list[Group]:
    found = [m.fused for m in model.modules() if isinstance(m, DecoderLayer)]
    return [p.group for f in found if isinstance(f, Fused) for p in (f.parts.qkv, f.parts.out, f.parts.inputs, f.parts.down)]


def test_held_in_e4m3_the_same_bits_as_without() -> None:
    model, adapter = _model("llama", NF4)
    prepare(model, products=Float8())
    assert not any(g.float8_held for g in _groups(model))
    hidden, expected = gradients_of(model, adapter)
    prepare(model, products=Float8(), decoded=True)
    groups = _groups(model)
    assert all(g.float8_held and not g.held for g in groups)
    got_hidden, got = gradients_of(model, adapter)
    assert torch.equal(got_hidden, hidden) and all(torch.equal(got[name], grad) for name, grad in expected.items())
    layers = [m.fused for m in model.modules() if isinstance(m, DecoderLayer)]
    assert all(isinstance(f, Fused) and f.decoded_bytes > 0 for f in layers)
    for fused in layers:
        assert isinstance(fused, Fused)
        fused.decode(False)
        assert fused.decoded_bytes == 0
    got_hidden, _ = gradients_of(model, adapter)
    assert torch.equal(got_hidden, hidden) and not any(g.float8_held for g in _groups(model))
    remove(model)


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("fmt", [pytest.param(NF4, id="nf4"), NONE])
def test_products_in_fp8_give_way_to_those_of_the_compute_dtype(fmt: Format | None, decoded: bool) -> None:
    model, _ = _model("llama", fmt)
    with torch.no_grad():
        prepare(model, products=Augmented(Float8.padded_to))
        expected = hidden_of(model)
        prepare(model, products=Float8(), decoded=decoded)
        before = hidden_of(model)
        with pytest.raises(KeyError), exact(model):
            assert torch.equal(hidden_of(model), expected) and not torch.equal(before, expected)
            raise KeyError
        assert torch.equal(hidden_of(model), before)
    remove(model)


@pytest.mark.parametrize("fmt", [pytest.param(NF4, id="nf4"), NONE])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_the_same_bits_as_without(family: str, fmt: Format | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = _model(family, fmt)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(Augmented, "holds", False)
        prepare(model)
    assert not any(g.held for g in _groups(model))
    hidden, expected = gradients_of(model, adapter)
    prepare(model, decoded=True)
    assert all(g.held for g in _groups(model))
    got_hidden, got = gradients_of(model, adapter)
    assert torch.equal(got_hidden, hidden) and all(torch.equal(got[name], grad) for name, grad in expected.items())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], t) for name, t in before.items())
    remove(model)
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_16_bit_weights_are_stored_once_and_only_the_adapter_is_written() -> None:
    model, adapter = _model("llama", None)
    prepare(model)
    storages = {s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in model.parameters())}
    groups = _groups(model)
    assert {g.matrix(torch.float32).untyped_storage().data_ptr() for g in groups} <= set(storages)
    extra = sum(4 * ((g.rows + g.rank) * (g.width + g.rank) - g.rows * g.width) for g in groups)
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters()) + extra
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.mul_(2.0)
    _, got = gradients_of(model, adapter)
    remove(model)
    _, expected = gradients_of(model, adapter)
    for name, grad in expected.items():
        assert (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


@pytest.mark.parametrize("fmt", [pytest.param(NF4, id="nf4"), NONE])
def test_an_adapter_is_switched_off_and_on(fmt: Format | None) -> None:
    model, adapter = _model("llama", fmt)
    prepare(model, decoded=True)
    on = hidden_of(model)
    held = [g.matrix(torch.float32).data_ptr() for g in _groups(model)]
    with adapter.enabled(False), torch.no_grad():
        off = hidden_of(model)
        if fmt is None:  # the weights stand where they stood
            assert {g.matrix(torch.float32).data_ptr() for g in _groups(model)} == set(held)
    assert torch.equal(hidden_of(model), on) and not torch.allclose(on, off)
    if fmt is None:
        assert [g.matrix(torch.float32).data_ptr() for g in _groups(model)] == held
    remove(model)
    with adapter.enabled(False), torch.no_grad():
        torch.testing.assert_close(off, hidden_of(model), atol=2e-5, rtol=1e-4)


def test_groups_without_an_adapter_are_read_where_they_stand() -> None:
    model, adapter = _model("llama", None, AdapterConfig(rank=4, targets=["q_proj"]))
    prepare(model)
    qkv, out, _, down = _groups(model)[:4]
    assert qkv.held and not out.held and not down.held
    weights = [g.members[0].weight for g in (out, down)]
    assert all(g.matrix(torch.float32).data_ptr() == w.data_ptr() for g, w in zip((out, down), weights, strict=True))
    _, got = gradients_of(model, adapter)
    remove(model)
    _, expected = gradients_of(model, adapter)
    assert all((got[name] - g).abs().max() <= 1e-4 * g.abs().max() for name, g in expected.items())


def test_a_model_that_holds_is_saved_as_any_other(tmp_path: Path) -> None:
    model, _ = pair("llama", None)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    adapter = lora.attach(model, AdapterConfig(rank=4), seed=1)
    prepare(model)
    adapter.remove()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], t) for name, t in expected.items())


def test_decoded_weights_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = _model("llama", NF4)
    prepare(model, decoded=True)
    written: list[bool] = []
    write = Group._write
    monkeypatch.setattr(Group, "_write", lambda self, out, weights: (written.append(weights), write(self, out, weights))[1])
    hidden = hidden_of(model)
    hidden.sum().backward()
    assert len(written) == 2 * 8 and not any(written)


def test_decoded_weights_are_dropped_and_held_again_as_the_plan_counts_them() -> None:
    model, adapter = _model("llama", NF4)
    prepare(model, decoded=True)
    hidden, expected = gradients_of(model, adapter)
    layers = [m.fused for m in model.modules() if isinstance(m, DecoderLayer)]
    for on in (False, True, True):
        for one in layers:
            assert isinstance(one, Fused)
            one.decode(on)
            groups = [p.group for p in (one.parts.qkv, one.parts.out, one.parts.inputs, one.parts.down)]
            assert one.decoded_bytes == on * sum(4 * (g.rows + g.rank) * (g.width + g.rank) for g in groups)
        assert all(g.held == on for g in _groups(model))
        got_hidden, got = gradients_of(model, adapter)
        assert torch.equal(got_hidden, hidden) and all(torch.equal(got[name], grad) for name, grad in expected.items())


def test_what_changes_between_calls_is_noticed() -> None:
    model, adapter = _model("llama", NF4)
    prepare(model)
    layer = next(iter(adapter.layers.values()))

    def same_as_modules() -> bool:
        fused = hidden_of(model).detach()
        layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
        kept = [m.fused for m in layers]
        for m in layers:
            m.fused = None
        plain = hidden_of(model).detach()
        for m, fused_layer in zip(layers, kept, strict=True):
            m.fused = fused_layer
        return torch.allclose(fused, plain, atol=2e-5, rtol=1e-4)

    assert same_as_modules()
    layer.scale *= 3.0
    assert same_as_modules()
    layer.lora_b = nn.Parameter(layer.lora_b.detach() + 0.1)
    assert same_as_modules()
    layer.lora_a.data = layer.lora_a.detach().clone() * 2.0
    assert same_as_modules()
    copied = copy.deepcopy(model)
    adapter.layers.popitem()[1].active = False
    assert same_as_modules()
    adapter.remove()
    assert same_as_modules()
    assert not torch.equal(hidden_of(copied), hidden_of(model))


def test_nothing_is_read_again_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = _model("llama", NF4, AdapterConfig(rank=4, dropout=0.1))
    adapter.set_dropout_state(1, 0, 0, tokens=64)
    prepare(model)
    hidden_of(model)
    read: list[int] = []
    again = Fused._read
    monkeypatch.setattr(Fused, "_read", lambda self: (read.append(1), again(self))[1])
    for step in range(3):
        adapter.set_dropout_state(1, step, 0)
        hidden_of(model).sum().backward()
    assert not read
    model.eval()
    hidden_of(model)
    assert len(read) == 2


@pytest.mark.parametrize("padded_to", [16, 32])
def test_ranks_padded_to_another_multiple_change_no_number(padded_to: int) -> None:
    model, adapter = _model("llama", NF4)
    prepare(model)
    hidden, expected = gradients_of(model, adapter)
    prepare(model, products=Augmented(padded_to))
    assert {g.rank for g in _groups(model)} == {padded_to}
    got_hidden, got = gradients_of(model, adapter)
    torch.testing.assert_close(got_hidden, hidden, atol=2e-5, rtol=1e-4)
    for name, grad in expected.items():
        assert (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name
