"""A packed and adopted model is the model: logits, adapter gradients and greedy text equal plain transformers + PEFT in fp32."""

from __future__ import annotations

import pytest
import torch

from halfbyte.formats.packed import Format
from halfbyte.layers import forward, recompute, swap
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.linear import Linear4bit
from layers.families import ADOPTED, LEFT, NF4, pair, peft_gradients, row, with_adapters
from support import tiny_model

pytestmark = pytest.mark.cpu

FORMATS = [pytest.param(NF4, id="nf4"), pytest.param(None, id="none")]


def _is_adopted(model: torch.nn.Module) -> bool:
    return any(isinstance(m, DecoderLayer) for m in model.modules())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family", [*ADOPTED, *LEFT])
def test_logits_and_adapter_gradients_equal_transformers_and_peft(family: str, fmt: Format | None) -> None:
    ours, plain = pair(family, fmt)
    assert _is_adopted(ours) == (family in ADOPTED)
    adapter, reference = with_adapters(ours, plain)
    ids, _, _ = row((20,))
    weight = torch.randn(1, 20, 272, generator=torch.Generator().manual_seed(4))
    expected = reference(input_ids=ids, use_cache=False).logits
    got = ours(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    theirs = peft_gradients(reference)
    names = {name for name, _, _ in adapter.parameters()}
    assert names == set(theirs)
    for name, parameter, _ in adapter.parameters():
        scale = theirs[name].abs().max()
        assert scale > 0, name
        assert (parameter.grad - theirs[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", [*ADOPTED, *LEFT])
def test_a_packed_row_equals_its_examples_alone(family: str, recomputed: bool) -> None:
    still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    ours, plain = pair(family, NF4, **still)
    adapter, reference = with_adapters(ours, plain)
    lengths = (7, 16, 1, 10)
    ids, positions, cu_seqlens = row(lengths)
    if recomputed:
        recompute.set_recompute(ours, True)
        ours.train()  # it acts in training mode only
    hidden = forward.hidden_states(ours, ids, positions, cu_seqlens)
    inner = reference.base_model.model.base_model
    alone = [inner(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(lengths, 1)]
    expected = torch.cat(alone, 1)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-4)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    (hidden * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = peft_gradients(reference)
    for name, parameter, _ in adapter.parameters():
        assert (parameter.grad - theirs[name]).abs().max() <= 1e-4 * theirs[name].abs().max().clamp_min(1e-6), name


@pytest.mark.parametrize("family", [*ADOPTED, *LEFT])
def test_greedy_text_is_transformers_own(family: str) -> None:
    ours, plain = pair(family, NF4)
    ids, _, _ = row((9,))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
def test_greedy_text_of_a_left_padded_batch(family: str) -> None:
    ours, plain = pair(family, NF4)
    ids, _, _ = row((24,))
    batch = ids.view(2, 12).clone()
    mask = torch.ones_like(batch)
    batch[0, :5], mask[0, :5] = 0, 0
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(ours.generate(batch, **settings), plain.generate(batch, **settings))


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_is_kept_in_packed_rows_and_in_generation(family: str) -> None:
    changes = {"sliding_window": 5} | ({"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {})
    ours, plain = pair(family, None, **changes)
    assert _is_adopted(ours)
    lengths = (4, 17, 9)
    ids, positions, cu_seqlens = row(lengths)
    hidden = forward.hidden_states(ours, ids, positions, cu_seqlens)
    alone = [plain.base_model(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(lengths, 1)]
    torch.testing.assert_close(hidden, torch.cat(alone, 1), atol=2e-5, rtol=1e-4)
    wide, _ = pair(family, None)
    without = forward.hidden_states(wide, ids, positions, cu_seqlens)
    assert (without - hidden).abs().max() > 1e-3  # the window mattered
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.mark.parametrize("window", [24, 5])
def test_a_soft_cap_is_kept_in_packed_rows_and_in_generation(window: int) -> None:
    """Gemma 2: scores capped, every other layer with a window; against transformers' eager attention, example by example."""
    changes = {"attn_logit_softcapping": 0.05, "sliding_window": window, "query_pre_attn_scalar": 1}
    ours, plain = pair("gemma2", None, **changes)
    assert _is_adopted(ours)
    adapter, reference = with_adapters(ours, plain)
    lengths = (4, 17, 1, 9)
    ids, positions, cu_seqlens = row(lengths)
    hidden = forward.hidden_states(ours, ids, positions, cu_seqlens)
    inner = reference.base_model.model.base_model
    expected = torch.cat([inner(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-4)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    (hidden * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = peft_gradients(reference)
    for name, parameter, _ in adapter.parameters():
        assert (parameter.grad - theirs[name]).abs().max() <= 1e-4 * theirs[name].abs().max().clamp_min(1e-6), name
    uncapped, other = pair("gemma2", None, **changes | {"attn_logit_softcapping": None})
    with_adapters(uncapped, other)
    assert (forward.hidden_states(uncapped, ids, positions, cu_seqlens) - hidden).abs().max() > 1e-3  # the cap mattered
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), reference.generate(input_ids=ids, **settings))


def test_hidden_states_are_still_recorded() -> None:
    plain = tiny_model("llama")
    ours = tiny_model("llama")
    swap.adopt(ours)
    ids, _, _ = row((9,))
    expected = plain(ids, output_hidden_states=True).hidden_states
    got = ours(ids, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_dropout_of_the_base_stays_in_its_place(family: str) -> None:
    changes = {"resid_pdrop": 0.5} | ({"attn_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {})
    ours, plain = pair(family, None, **changes)
    assert _is_adopted(ours)
    ids, _, _ = row((12,))
    out = []
    for model in (ours, plain):
        model.train()
        torch.manual_seed(0)
        out.append(model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(out[0], out[1], atol=2e-5, rtol=1e-4)
    assert (out[0] - ours.eval()(input_ids=ids, use_cache=False).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        *((family, {}, reason) for family, reason in LEFT.items()),
        ("falcon-alibi", {}, "its attention is biased by position (alibi), which is not built"),
        ("falcon", {"hidden_dropout": 0.1}, "dropout `hidden_dropout` is active and its place is unknown"),
        ("falcon", {"attention_dropout": 0.1}, "its attention has dropout and does not go through transformers'"),
        ("falcon", {"sliding_window": 4096}, "does not go through transformers' attention interface and has `sliding_window`"),
        ("starcoder2", {"residual_dropout": 0.1}, "dropout `residual_dropout` is active and its place is unknown"),
        ("stablelm", {"qk_layernorm": True}, "its attention has an unknown submodule: q_layernorm, k_layernorm"),
        ("gemma3", {"use_bidirectional_attention": True}, "its attention looks ahead (is_causal is false)"),
    ],
)
def test_what_is_left_runs_linear_by_linear_and_is_named_in_the_log(
    family: str, changes: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "halfbyte"):
        ours, plain = pair(family, NF4, **changes)
    told = [record.getMessage() for record in caplog.records if "decoder layers" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("0 of 2 decoder layers adopted (left, linear by linear: ")
    assert reason in told[0]
    assert not _is_adopted(ours)
    linear = [m for m in ours.base_model.modules() if isinstance(m, torch.nn.Linear)]
    assert linear and all(isinstance(m, Linear4bit) for m in linear)
    ids, _, _ = row((12,))
    torch.testing.assert_close(ours(ids, use_cache=False).logits, plain(ids, use_cache=False).logits, atol=2e-5, rtol=1e-4)


def test_a_layer_that_differs_from_the_generic_one_is_left_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    kind = type(model.model.layers[1])

    class Shifted(kind):  # type: ignore[misc, valid-type]
        def forward(
            self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: object
        ) -> torch.Tensor:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs) + 0.01

    model.model.layers[1].__class__ = Shifted
    report = swap.adopt(model)
    assert [r.adopted for r in report.layers] == [True, False]
    assert "the probe disagrees" in report.layers[1].reason
