"""The adapter: how it starts, what learns, how it is switched off, and that PEFT agrees."""

from __future__ import annotations

import math
import warnings

import peft
import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.adapters import full, lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import ModelError
from halfbyte.formats.packed import Format
from halfbyte.layers import forward, head, swap
from support import tiny_model

NF4 = Format("nf4", 64, True)
IDS = torch.arange(12)[None] * 7 % 250


def _model(
    family: str = "llama", fmt: Format | None = NF4, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    model = tiny_model(family, **changes).to(dtype)
    swap.pack(model, None, fmt)
    swap.adopt(model)
    return model


def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.detach()


def _shake(adapter: lora.Adapter) -> None:
    with torch.no_grad():
        for _, p, _ in adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


@pytest.mark.parametrize("fmt", [NF4, None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_fresh_adapter_changes_nothing_and_starts_as_pefts(family: str, fmt: Format | None) -> None:
    model = _model(family, fmt)
    before = _logits(model)
    adapter = lora.attach(model, AdapterConfig(rank=64), seed=0)
    assert torch.equal(_logits(model), before)
    for layer in adapter.layers.values():
        assert not layer.lora_b.any()
        bound = 1 / math.sqrt(layer.in_features)  # kaiming uniform with a = sqrt(5)
        assert layer.lora_a.abs().max() <= bound
        assert abs(float(layer.lora_a.detach().std()) - bound / math.sqrt(3)) < 0.05 * bound
        assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32


def test_a_start_depends_on_seed_and_path_only() -> None:
    path = "model.layers.1.mlp.up_proj"
    one = lora.attach(tiny_model(), AdapterConfig(), 3).layers[path].lora_a
    alone = lora.attach(tiny_model(), AdapterConfig(targets=[path]), 3).layers[path].lora_a
    other = lora.attach(tiny_model(), AdapterConfig(), 4).layers[path].lora_a
    assert torch.equal(one, alone) and not torch.equal(one, other)


def test_only_the_adapter_learns() -> None:
    adapter = lora.attach(_model(), AdapterConfig(rank=4), 0)
    rows = adapter.parameters()
    assert len(rows) == 28 and {role for _, _, role in rows} == {"lora_a", "lora_b"}
    assert rows[0][0] == "model.layers.0.self_attn.q_proj.lora_a"
    assert adapter.trainable == sum(4 * (layer.in_features + layer.out_features) for layer in adapter.layers.values())


def test_summary_shares_of_base_and_adapter() -> None:
    model = _model()
    base = sum(p.numel() for p in tiny_model().parameters())
    adapter = lora.attach(model, AdapterConfig(rank=4), 0)
    share = adapter.trainable / (base + adapter.trainable)
    assert adapter.summary() == f"{adapter.trainable:,} trainable parameters ({share:.2%}) in 14 LoRA layers"


def test_rank_alpha_and_scale_by_pattern() -> None:
    config = AdapterConfig(rank=8, alpha=16, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*q_proj": 5})
    layers = lora.attach(tiny_model(), config, 0).layers
    first, second = (layers[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    assert first.lora_a.shape[0] == second.lora_a.shape[0] == 2
    assert (first.scale, second.scale, layers["model.layers.0.mlp.up_proj"].scale) == (8.0, 2.5, 2.0)
    stabilised = lora.attach(tiny_model(), config.model_copy(update={"rslora": True}), 0).layers
    assert stabilised["model.layers.0.mlp.up_proj"].scale == pytest.approx(16 / math.sqrt(8))


def test_a_pattern_that_matches_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    lora.attach(tiny_model(), AdapterConfig(rank_pattern={"c_attn": 2}), 0)
    assert "adapter.rank_pattern: `c_attn` matches no adapted module" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_answers_when_the_adapter_is_off(dtype: torch.dtype) -> None:
    model = _model("gpt2", dtype=dtype)
    before = _logits(model)
    adapter = lora.attach(model, AdapterConfig(rank=4, bias="all", modules_to_save=["ln_f"]), 0)
    _shake(adapter)
    learned = _logits(model)
    assert learned.dtype == dtype
    assert (learned - before).abs().max() > 1e-2
    with adapter.enabled(False):
        assert torch.equal(_logits(model), before)
    assert torch.equal(_logits(model), learned)
    adapter.remove()
    assert torch.equal(_logits(model), before)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_what_learns_is_fp32_gets_a_gradient_and_leaves_the_compute_dtype(family: str, dtype: torch.dtype) -> None:
    model = _model(family, dtype=dtype)
    embedding = "wte" if family == "gpt2" else "word_embeddings" if family == "falcon" else "embed_tokens"
    adapter = lora.attach(model, AdapterConfig(rank=4, bias="all", modules_to_save=[embedding]), 0)
    _shake(adapter)
    out = model(input_ids=IDS, use_cache=False).logits
    assert out.dtype == dtype
    out.float().square().mean().backward()
    for name, p, role in adapter.parameters():
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32, name
        assert role == ("no_decay" if name.endswith("bias") else "dense" if embedding in name else name[-6:])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("fmt", [NF4, None])
def test_biases_below_an_adapter_learn_in_16_bits(fmt: Format | None, family: str, bias: str) -> None:
    model = _model(family, fmt, torch.bfloat16)
    before = _logits(model)
    adapter = lora.attach(model, AdapterConfig(rank=4, bias=bias), 0)
    biases = {name: p for name, p, _ in adapter.parameters() if name.endswith(".base_layer.bias")}
    assert torch.equal(_logits(model), before) and biases
    model(input_ids=IDS, use_cache=False).logits.float().square().mean().backward()
    for name, p in biases.items():
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32, name
    _shake(adapter)
    assert not torch.equal(_logits(model), before)
    adapter.remove()
    assert torch.equal(_logits(model), before)


def test_bias_lora_only() -> None:
    adapter = lora.attach(_model("gpt2"), AdapterConfig(targets=["c_fc"], bias="lora_only"), 0)
    names = [name for name, _, role in adapter.parameters() if role == "no_decay"]
    assert names == [f"transformer.h.{i}.mlp.c_fc.base_layer.bias" for i in (0, 1)]


def test_a_trained_head_is_the_heads_weight() -> None:
    model = _model()
    lora.attach(model, AdapterConfig(modules_to_save=["lm_head"]), 0)
    found = head.find(model)
    assert found.weight.requires_grad and found.weight is model.lm_head.weight


def test_a_tied_matrix_is_parted_as_in_peft() -> None:
    model = _model("llama", tie_word_embeddings=True)
    lora.attach(model, AdapterConfig(modules_to_save=["lm_head"]), 0)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.model.embed_tokens.weight.requires_grad


def test_a_packed_module_cannot_be_trained_whole() -> None:
    with pytest.raises(ModelError, match="is packed") as error:
        lora.attach(_model(), AdapterConfig(targets=["q_proj"], modules_to_save=["up_proj"]), 0)
    assert "format.skip" in error.value.hint and error.value.code == "adapter.packed"


def test_two_adapters_are_refused() -> None:
    model = _model()
    lora.attach(model, AdapterConfig(), 0)
    with pytest.raises(ModelError, match="already carries"):
        lora.attach(model, AdapterConfig(), 0)


def test_dropout_is_a_function_of_step_and_row_not_of_the_microbatch() -> None:
    model = _model("qwen3").train()
    adapter = lora.attach(model, AdapterConfig(rank=4, dropout=0.5), 0)
    _shake(adapter)
    rows = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).repeat(2)[None]

    def together(step: int) -> torch.Tensor:
        adapter.set_dropout_state(7, step, 0, tokens=16)
        return forward.hidden_states(model, rows.view(1, 32), positions, torch.tensor([0, 16, 32], dtype=torch.int32)).detach()

    def apart(step: int) -> torch.Tensor:
        parts = []
        for r in range(2):
            adapter.set_dropout_state(7, step, r)
            parts.append(forward.hidden_states(model, rows[r][None], positions[:, :16], torch.tensor([0, 16], dtype=torch.int32)))
        return torch.cat(parts, 1).detach()

    torch.testing.assert_close(together(3), apart(3), atol=1e-5, rtol=1e-5)
    assert (together(3) - together(4)).abs().max() > 1e-2
    model.eval()
    assert torch.equal(together(3), together(4))
    masks = {(layer.mask, layer.number) for layer in adapter.layers.values()}
    assert len({id(mask) for mask, _ in masks}) == 1 and len({n for _, n in masks}) == 14


def test_peft_on_a_base_that_we_packed_and_adopted() -> None:
    model, reference = _model(), _model()
    adapter = lora.attach(reference, AdapterConfig(rank=4, alpha=8), 0)
    _shake(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            theirs = wrapped.base_model.model.get_submodule(path)
            theirs.lora_A["default"].weight.copy_(layer.lora_a)
            theirs.lora_B["default"].weight.copy_(layer.lora_b)
    expected = wrapped.eval()(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(_logits(reference), expected, atol=2e-5, rtol=1e-4)


def test_full_fine_tuning() -> None:
    model = _model(fmt=None, dtype=torch.bfloat16)
    adapter = full.attach(model)
    assert adapter.trainable == sum(p.numel() for p in model.parameters())
    assert {role for _, _, role in adapter.parameters()} == {"dense", "no_decay"}
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    hidden.float().square().mean().backward()
    without = {name for name, p, _ in adapter.parameters() if p.grad is None}
    assert without == {"lm_head.weight"}
    assert all(p.dtype == torch.float32 for _, p, _ in adapter.parameters())


def test_full_fine_tuning_of_a_packed_base_is_refused() -> None:
    with pytest.raises(ModelError, match="needs a 16-bit base"):
        full.attach(_model())
