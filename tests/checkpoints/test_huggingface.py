"""Loading a base from a directory: every family, every naming, and every way in which a directory can be wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.checkpoints import huggingface
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.errors import CheckpointError, FormatError, ModelError
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.packed import Format
from halfbyte.formats.quantize import dequantize, quantize
from halfbyte.layers.linear import Linear4bit
from support import CHATML, FAMILIES, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.arange(1, 20)[None]
NONE = FormatConfig(kind="none")


def load(directory: Path, fmt: FormatConfig | None = None, **fields: Any) -> huggingface.Base:
    return huggingface.load(ModelConfig(name=str(directory)), fmt or FormatConfig(**fields), torch.float32)


def edit(directory: Path, change: Any) -> None:
    """Rewrites the weights with what `change` makes of them."""
    file = directory / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, {"format": "pt"})


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers_when_dense(family: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m", family)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    base = load(directory, NONE)
    torch.testing.assert_close(base.model(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-5)
    assert base.report.packed == []
    assert base.report.params == sum(p.numel() for p in expected.parameters())
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_packs_the_weights_it_was_given(family: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m", family)
    original = tiny_model(family)
    base = load(directory)
    fmt = Format("nf4", 64, nested=True)
    layers = {path: m for path, m in base.model.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == len(base.report.packed) > 0
    for path, layer in layers.items():
        source = original.get_submodule(path)
        weight = source.weight.T if type(source).__name__ == "Conv1D" else source.weight
        assert torch.equal(layer.weight, dequantize(quantize(weight.contiguous(), fmt))), path
        assert (layer.bias is None) == (source.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, source.bias)
    kept = {row.path for row in base.report.kept}
    for name in kept:
        assert torch.equal(base.model.get_parameter(name), original.get_parameter(name)), name
    assert base.report.bytes == sum(p.nbytes for p in base.model.parameters())


def test_state_dict_round_trips_strictly(tmp_path: Path) -> None:
    first = load(save_tiny(tmp_path / "a", seed=1))
    second = load(save_tiny(tmp_path / "b", seed=2))
    assert not torch.equal(first.model(IDS).logits, second.model(IDS).logits)
    second.model.load_state_dict(first.model.state_dict(), strict=True)
    assert torch.equal(first.model(IDS).logits, second.model(IDS).logits)
    assert first.digest != second.digest


def test_what_travels_with_the_model(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    edit_json(directory / "generation_config.json", temperature=0.25, do_sample=True)
    base = load(directory)
    assert base.tokenizer.chat_template == CHATML
    assert base.tokenizer.pad_token == tiny_tokenizer().pad_token
    assert base.model.generation_config.temperature == 0.25
    assert (base.name, base.revision, base.compute, base.source) == (str(directory), None, torch.float32, directory)
    assert not base.model.training


def test_compute_dtype_is_that_of_everything_not_packed(tmp_path: Path) -> None:
    base = huggingface.load(str(save_tiny(tmp_path / "m")), FormatConfig(), torch.bfloat16)
    assert {p.dtype for p in base.model.parameters()} == {torch.uint8, torch.bfloat16}
    assert base.model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("kind", ["fp4", "int4", "int8"])
def test_other_formats(kind: str, tmp_path: Path) -> None:
    base = load(save_tiny(tmp_path / "m"), kind=kind)
    again = load(save_tiny(tmp_path / "m"), kind=kind)
    assert {m.packed.format.kind for m in base.model.modules() if isinstance(m, Linear4bit)} == {kind}
    assert torch.equal(base.model(IDS).logits, again.model(IDS).logits)


def test_skip_adds_to_the_defaults(tmp_path: Path) -> None:
    base = load(save_tiny(tmp_path / "m"), skip=["*.down_proj", "model.layers.0.self_attn"])
    reasons = {row.path: row.reason for row in base.report.kept}
    assert "skip" in reasons["model.layers.1.mlp.down_proj.weight"]
    assert "skip" in reasons["model.layers.0.self_attn.q_proj.weight"]
    assert "lm_head.weight" in reasons
    assert type(base.model.get_submodule("model.layers.1.mlp.down_proj")) is torch.nn.Linear


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_names_without_the_base_model_prefix(family: str, tmp_path: Path) -> None:
    plain = load(save_tiny(tmp_path / "plain", family))
    directory = save_tiny(tmp_path / "bare", family)
    prefix = {"gpt2": "transformer.", "llama": "model."}[family]
    edit(directory, lambda t: {k.removeprefix(prefix): v for k, v in t.items()})
    assert load(directory).digest == plain.digest


def test_old_gpt2_mask_buffers_are_ignored_by_rule(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m", "gpt2")
    edit(
        directory,
        lambda t: t | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.1.attn.masked_bias": torch.ones(1)},
    )
    assert load(directory).digest == load(save_tiny(tmp_path / "plain", "gpt2")).digest


def tied(directory: Path, change: Any) -> Path:
    save_tiny(directory, tie_word_embeddings=True)
    edit(directory, change)
    return directory


def test_tied_weights_by_either_name_or_both(tmp_path: Path) -> None:
    def both(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}

    def head_only(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()}

    digests = set()
    for i, change in enumerate((dict, both, head_only)):
        base = load(tied(tmp_path / str(i), change))
        assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
        assert base.report.params == sum(p.numel() for p in tiny_model(tie_word_embeddings=True).parameters())
        digests.add(base.digest)
    assert len(digests) == 1


def test_tied_weights_that_differ_stay_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tied(tmp_path / "m", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    for _ in ("quantised", "from the cache"):
        base = load(directory)
        torch.testing.assert_close(base.model.lm_head.weight, base.model.model.embed_tokens.weight + 1)
        assert base.model.config.tie_word_embeddings is False
    assert "differ in the file" in caplog.text


def test_every_mismatch_is_listed_at_once(tmp_path: Path) -> None:
    def spoil(t: dict[str, Tensor]) -> dict[str, Tensor]:
        t["model.layers.0.self_attn.q_projj.weight"] = t.pop("model.layers.0.self_attn.q_proj.weight")
        del t["model.norm.weight"]
        t["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
        t["surplus"] = torch.zeros(1)
        return t

    directory = save_tiny(tmp_path / "m")
    edit(directory, spoil)
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    text = str(caught.value)
    for part in (
        "missing (2)",
        "model.norm.weight",
        "q_proj.weight",
        "unexpected (2)",
        "surplus",
        "wrong shape (1)",
        "[3, 64]",
        "[160, 64]",
    ):
        assert part in text
    assert "q_projj" in caught.value.hint
    assert caught.value.code == "checkpoint.mismatch"


def test_a_nan_names_its_tensor(tmp_path: Path) -> None:
    def spoil(t: dict[str, Tensor]) -> dict[str, Tensor]:
        t["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
        return t

    directory = save_tiny(tmp_path / "m")
    edit(directory, spoil)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(directory)


def test_shards_by_index(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    tiny_model().save_pretrained(directory, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(directory)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert load(directory).digest == load(save_tiny(tmp_path / "one")).digest


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    directory = save_tiny(tmp_path / "m")
    huggingface.load(str(directory), FormatConfig(), torch.float32, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[0][1] == 0 and calls[-1][1] == calls[-1][2] == sum(p.nbytes for p in tiny_model().parameters())


def test_inspect_needs_no_weights(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    loaded = load(directory).report
    (directory / "model.safetensors").unlink()
    report = huggingface.inspect(str(directory), FormatConfig(), torch.float32)
    assert [(r.path, r.packed, r.bytes) for r in report.rows] == [(r.path, r.packed, r.bytes) for r in loaded.rows]
    assert huggingface.inspect(str(directory), NONE).packed == []


def test_a_foreign_quantisation_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="gptq"):
        load(directory)


def test_a_model_that_is_not_causal(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    edit_json(directory / "config.json", model_type="t5")
    with pytest.raises(ModelError, match="not a causal language model"):
        load(directory)


def test_an_unknown_model_type(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    edit_json(directory / "config.json", model_type="llama99")
    with pytest.raises(ModelError, match="llama99"):
        load(directory)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load(directory)


def test_nothing_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "no spaces/in a hub id", str(tmp_path / "x.gguf")):
        with pytest.raises(CheckpointError, match="there is no"):
            huggingface.load(name, FormatConfig(), torch.float32)


def test_the_log_says_what_was_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load(save_tiny(tmp_path / "m"))
    assert "14 of 21 tensors packed" in caplog.text
