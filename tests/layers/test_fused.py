"""The fused layer is the layer: outputs and every gradient equal transformers + PEFT, whatever is kept, dropped or shared."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import ModelError
from halfbyte.formats.packed import Format
from halfbyte.layers import recompute, swap
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.forward import hidden_states
from halfbyte.layers.fused import gradients, prove
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, OFFLOADED, Keep
from halfbyte.layers.fused.prepare import prepare, remove
from halfbyte.layers.structure import NotUnderstood
from halfbyte.optim.flat import flatten
from layers.families import (
    ADOPTED,
    FUSED,
    LENGTHS,
    NF4,
    STILL,
    adapted,
    gradients_of,
    hidden_of,
    learned,
    pair,
    peft_gradients,
    row,
    weight_of,
    with_adapters,
)
from support import tiny_model

Tensors = dict[str, Tensor]
KEEPS = [Keep(*flags) for flags in itertools.product((False, True), repeat=5)]


def _compare(adapter: lora.Adapter, theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert {name for name, _, _ in adapter.parameters()} == set(theirs)
    for name, parameter, _ in adapter.parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - theirs[name]).abs().max() <= tolerance * theirs[name].abs().max().clamp_min(1e-6), name


@pytest.mark.cpu
@pytest.mark.parametrize("fmt", [pytest.param(NF4, id="nf4"), pytest.param(None, id="none")])
@pytest.mark.parametrize("keep", [EVERYTHING, INPUTS], ids=["everything", "inputs"])
@pytest.mark.parametrize("family", FUSED)
def test_a_packed_row_equals_transformers_and_peft(family: str, keep: Keep, fmt: Format | None) -> None:
    ours, plain = pair(family, fmt, **STILL.get(family, {}))
    adapter, reference = with_adapters(ours, plain)
    done = prepare(ours, keep)
    assert (done.layers, done.left) == (2, {})
    hidden = hidden_of(ours.train())
    inner = reference.base_model.model.base_model
    ids, _, _ = row(LENGTHS)
    expected = torch.cat([inner(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-4)
    (hidden * weight_of(hidden)).sum().backward()
    (expected * weight_of(hidden)).sum().backward()
    _compare(adapter, peft_gradients(reference))


@pytest.mark.cpu
@pytest.mark.parametrize("family", FUSED)
def test_unpacked_rows_too(family: str) -> None:
    ours, plain = pair(family, NF4, **STILL.get(family, {}))
    adapter, reference = with_adapters(ours, plain)
    prepare(ours)
    ids = row((24,))[0].view(2, 12)
    got = ours.train()(input_ids=ids, use_cache=False).logits
    expected = reference(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    weight = weight_of(expected)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    _compare(adapter, peft_gradients(reference))


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(rank=4, dropout=0.3),
        AdapterConfig(rank=4, targets=["q_proj", "v_proj", "up_proj"]),
        AdapterConfig(rank=4, targets=["o_proj"]),
        AdapterConfig(rank=20, rank_pattern={"k_proj": 3, "up_proj": 7}, alpha_pattern={"q_proj": 1.0}, rslora=True),
        AdapterConfig(rank=5, dropout=0.5, targets=["k_proj", "down_proj"]),
    ],
    ids=["dropout", "some", "one", "patterns", "dropout-some"],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_every_adapter_stays_on_the_path(family: str, config: AdapterConfig) -> None:
    if family == "phi3" and isinstance(config.targets, list):
        config = config.model_copy(update={"targets": ["qkv_proj", "down_proj"]})
    model, adapter = learned(config, family)
    hidden, expected = gradients_of(model, adapter)
    assert prepare(model).layers == 2
    got_hidden, got = gradients_of(model, adapter)
    torch.testing.assert_close(got_hidden, hidden, atol=2e-5, rtol=1e-4)
    for name, grad in expected.items():
        assert (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 5}),
        ("gemma2", {"attn_logit_softcapping": 0.5, "sliding_window": 5, "query_pre_attn_scalar": 1}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ],
    ids=["window", "cap-and-window", "partial-rotation"],
)
def test_what_is_short_in_these_rows_is_made_to_matter(family: str, changes: dict[str, object]) -> None:
    """Windows shorter than a document, caps below the scores, heads that turn in part: as the modules have them."""
    (model, _), (usual, _) = pair(family, NF4, **changes), pair(family, NF4)
    adapter = adapted(model, AdapterConfig(rank=4))
    hidden, expected = gradients_of(model, adapter)
    adapted(usual, AdapterConfig(rank=4))
    assert (hidden_of(usual) - hidden).abs().max() > 1e-3
    assert prepare(model, INPUTS).layers == 2
    got_hidden, got = gradients_of(model, adapter)
    torch.testing.assert_close(got_hidden, hidden, atol=2e-5, rtol=1e-4)
    for name, grad in expected.items():
        assert grad is not None and (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_parallel_branches_with_a_norm_each() -> None:
    """No family above has them in a layout that is fused, so a Llama is rewritten."""
    model = tiny_model("llama")
    kind = type(model.model.layers[0])

    class Parallel(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
            normed = self.input_layernorm(hidden_states)
            attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
            out: Tensor = hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))
            return out

    with torch.no_grad():
        for layer in model.model.layers:
            layer.__class__ = Parallel
            layer.input_layernorm.weight.uniform_(0.5, 1.5)
            layer.post_attention_layernorm.weight.uniform_(0.5, 1.5)
    swap.pack(model, None, NF4)
    swap.adopt(model)
    adapter = adapted(model, AdapterConfig(rank=4))
    hidden, expected = gradients_of(model, adapter)
    for keep in (EVERYTHING, INPUTS):
        done = prepare(model, keep)
        assert (done.layers, done.left) == (2, {})
        got_hidden, got = gradients_of(model, adapter)
        torch.testing.assert_close(got_hidden, hidden, atol=2e-5, rtol=1e-4)
        for name, grad in expected.items():
            assert grad is not None and (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


@pytest.mark.cpu
@pytest.mark.parametrize(
    "keep", [*KEEPS, OFFLOADED], ids=lambda k: "".join(str(int(v)) for v in (k.normed, k.qkv, k.attended, k.mid, k.inputs))
)
def test_whatever_is_kept_the_gradients_are_the_same_bits(keep: Keep) -> None:
    model, adapter = learned(AdapterConfig(rank=4, dropout=0.2), "qwen3")
    prepare(model)
    hidden, expected = gradients_of(model, adapter)
    prepare(model, keep)
    got_hidden, got = gradients_of(model, adapter)
    assert torch.equal(got_hidden, hidden)
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name


def test_gradients_in_place_are_added_to_the_flat_buffers() -> None:
    model, adapter = learned(AdapterConfig(rank=4))
    prepare(model)
    _, expected = gradients_of(model, adapter)
    expected = {name: g.clone() for name, g in expected.items()}
    flat = flatten(adapter.parameters())
    prepare(model, in_place=True)
    for _ in range(2):
        hidden = hidden_of(model)
        (hidden * weight_of(hidden)).sum().backward()
    for group in flat.groups:
        for segment in group.segments:
            found = group.view(group.grads, segment)
            torch.testing.assert_close(found, 2 * expected[segment.name], atol=1e-5, rtol=1e-4)


def test_neighbouring_gradients_are_one_product() -> None:
    model, adapter = learned(AdapterConfig(rank=4))
    flatten(adapter.parameters())
    layer = next(m for m in model.modules() if isinstance(m, DecoderLayer))
    three = [layer.get_submodule(f"self_attn.{n}_proj").lora_a for n in "qkv"]
    stacked = gradients.Gradients(in_place=True).stacked(three)
    assert stacked is not None and stacked.shape == (12, 64) and stacked.data_ptr() == three[0].grad.data_ptr()
    assert gradients.Gradients(in_place=True).stacked([three[0], three[2]]) is None
    assert gradients.Gradients(in_place=False).stacked(three) is None


def test_a_gradient_left_for_the_layer_below_is_nobody_elses() -> None:
    """Between two fused layers one runs its modules; without an adapter on `down` its gradient looks like what was left."""
    model, _ = pair("llama", NF4, num_hidden_layers=3)
    adapter = adapted(model, AdapterConfig(rank=4, targets=["q_proj"]))
    _, expected = gradients_of(model, adapter)
    assert prepare(model).layers == 3
    [m for m in model.modules() if isinstance(m, DecoderLayer)][1].fused = None
    _, got = gradients_of(model, adapter)
    for name, grad in expected.items():
        assert grad is not None and (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_a_row_of_the_same_length_has_its_own_positions() -> None:
    model, _ = learned(AdapterConfig(rank=4))
    other = row((20, 14))
    with torch.no_grad():
        expected = hidden_states(model, *other)
        prepare(model)
        hidden_of(model)
        torch.testing.assert_close(hidden_states(model, *other), expected, atol=2e-5, rtol=1e-4)


def test_backward_twice_is_refused() -> None:
    model, adapter = learned(AdapterConfig(rank=4))
    prepare(model)
    loss = hidden_of(model).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(ModelError, match="ran twice"):
        loss.backward()
    del adapter


def test_an_adapter_that_changed_between_forward_and_backward_is_found() -> None:
    model, adapter = learned(AdapterConfig(rank=4))
    prepare(model)
    loss = hidden_of(model).sum()
    with torch.no_grad():
        next(iter(adapter.layers.values())).lora_b.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_fused_is_left_and_named() -> None:
    model, _ = pair("llama", NF4)
    lora.attach(model, AdapterConfig(rank=4, modules_to_save=["input_layernorm"]), seed=1)
    done = prepare(model)
    assert done.layers == 0 and all("learns beside the adapter" in reason for reason in done.left.values())
    model, _ = pair("gpt2", None, resid_pdrop=0.1)
    assert "dropout of the base" in prepare(model).summary()


@pytest.mark.parametrize("family", sorted(set(ADOPTED) - set(FUSED)))
def test_families_whose_layers_are_not_fused_are_named(family: str) -> None:
    reasons = {"cohere-qk-norm": "the norm CohereLayerNorm has another shape of weight or no eps"}
    done = prepare(pair(family, NF4)[0])
    assert set(done.left.values()) == {reasons.get(family, "queries, keys and values are interleaved in one projection")}


def test_a_layer_that_disagrees_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = learned(AdapterConfig(rank=4))
    monkeypatch.setattr("halfbyte.layers.fused.backward.fp8.glu_backward", lambda dh, gate, up, activation, rows: None)
    done = prepare(model)
    assert done.layers == 0 and "is off by" in done.summary()


def test_an_unlucky_draw_of_the_proof_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compare, seen = prove._compare, list[Tensor]()

    def unlucky(got: Tensors, honest: Tensors, truth: Tensors, hidden: Tensor, floor: float) -> None:
        seen.append(hidden)
        if len(seen) == 1:
            raise NotUnderstood("the fused gradient is off")
        compare(got, honest, truth, hidden, floor)

    monkeypatch.setattr(prove, "_compare", unlucky)
    model, _ = learned(AdapterConfig(rank=4))
    done = prepare(model)
    assert done.layers == done.total and len(seen) == 2 and not torch.equal(*seen)


def test_recompute_by_modules_stops_and_switching_off_brings_the_modules_back() -> None:
    model, adapter = learned(AdapterConfig(rank=4))
    recompute.set_recompute(model, True)
    ids, _, _ = row((9,))
    assert not model.get_input_embeddings()(ids).requires_grad, "nobody wants the gradient of a frozen embedding's output"
    prepare(model, INPUTS)
    layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    assert not any(layer.gradient_checkpointing for layer in layers)
    with adapter.enabled(False), torch.no_grad():
        base = hidden_of(model)
    remove(model)
    assert all(layer.fused is None for layer in layers)
    with adapter.enabled(False), torch.no_grad():
        torch.testing.assert_close(base, hidden_of(model), atol=2e-5, rtol=1e-4)


def test_a_cache_and_a_dense_mask_go_through_the_modules() -> None:
    model, _ = learned(AdapterConfig(rank=4))
    model.eval()
    ids, _, _ = row((9,))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    prepare(model)
    assert torch.equal(model.generate(ids, **settings), expected)
