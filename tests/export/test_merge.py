"""Merging: the merged model is loaded by transformers alone and must answer as the unmerged one did."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from halfbyte import machine
from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.checkpoints import huggingface, peft
from halfbyte.errors import CheckpointError, RecipeError
from halfbyte.export.merge import merge
from halfbyte.export.moved import moved
from halfbyte.formats.config import FormatConfig
from halfbyte.generate.chat import generate
from support import save_tiny

IDS = torch.arange(40).reshape(2, 20) * 7 % 256
NF4, DENSE = FormatConfig(), FormatConfig(kind="none")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))


def logits(model, ids=IDS):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def trained(tmp_path, family="llama", fmt=NF4, compute=torch.float32, extras=None, model=None, **settings):
    """A base from disk with a trained adapter, saved in `tmp_path/adapter`."""
    source = save_tiny(tmp_path / "base", family, **(model or {}))
    base = huggingface.load(str(source), fmt, compute)
    adapter = lora.attach(base.model, AdapterConfig(rank=4, alpha=8, **settings), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter, _ in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft.save(adapter, tmp_path / "adapter", base, extras)
    return base


CASES = {
    "llama": ("llama", NF4, {}, {}),
    "qwen2-biases": ("qwen2", NF4, {"bias": "all"}, {}),
    "gpt2": ("gpt2", NF4, {"bias": "all", "targets": ["c_attn", "c_proj", "c_fc"]}, {}),
    "gpt2-dense": ("gpt2", DENSE, {"targets": ["c_attn", "c_fc"]}, {}),
    "falcon": ("falcon", NF4, {}, {}),
    "tied": ("qwen2", NF4, {}, {"tie_word_embeddings": True}),
    "untied-by-training": ("qwen2", NF4, {"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}),
    "saved": ("qwen3", NF4, {"modules_to_save": ["embed_tokens", "norm"]}, {}),
    "int8": ("llama", FormatConfig(kind="int8"), {"rslora": True}, {}),
    "int8-head": ("llama", FormatConfig(head="int8"), {}, {"tie_word_embeddings": False}),
    "nf4-head": ("qwen3", FormatConfig(head="nf4"), {}, {"tie_word_embeddings": False}),
    "int4": ("llama", FormatConfig(kind="int4", symmetric=False), {"targets": ["q_proj"]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_answers_as_the_unmerged_one(case, tmp_path):
    family, fmt, settings, model = CASES[case]
    base = trained(tmp_path, family, fmt, model=model, **settings)
    ours = logits(base.model)
    report = merge(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=2e-4)
    assert report.moved is not None and report.moved.max_abs < 2e-4 and report.moved.top1 == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1]
    assert not again["missing_keys"] and not again["unexpected_keys"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (case not in ("tied", "gpt2", "gpt2-dense", "falcon"))
    assert theirs.config.to_dict().get("quantization_config") is None


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_a_packed_head_answers_as_its_decoded_weight(head, tmp_path):
    base = trained(tmp_path, fmt=FormatConfig(head=head), model={"tie_word_embeddings": False})
    answer = generate(base, "abc", 8)
    weight = base.model.lm_head.weight
    base.model.lm_head = torch.nn.Linear(*reversed(weight.shape), bias=False)
    base.model.lm_head.weight = torch.nn.Parameter(weight)
    assert generate(base, "abc", 8).text == answer.text and answer.tokens > 0


def test_in_16_bits_it_moves_by_rounding_only(tmp_path):
    base = trained(tmp_path)
    ours = logits(base.model)
    report = merge(tmp_path / "adapter", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16 and report.dtype == torch.bfloat16
    # honest rounding: the unmerged model's own weights, decoded and rounded to bf16, must be of the same error
    error = (logits(theirs.float()) - ours).norm() / ours.norm()
    assert error < 0.02 and report.moved is not None and report.moved.kl < 1e-3 < report.moved.rms


def test_into_the_original_weights_on_request(tmp_path):
    trained(tmp_path, "gpt2", targets=["c_attn"])
    report = merge(tmp_path / "adapter", tmp_path / "out", into="original", dtype=torch.float32)
    original, merged = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    tensors = load_file(tmp_path / "adapter" / peft.TENSORS)
    for name, tensor in merged.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        expected = original[name].clone()
        if f"{stem}.lora_A.weight" in tensors:
            expected += 2.0 * (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]).T
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    same = merge(tmp_path / "adapter", tmp_path / "out2", dtype=torch.float32)
    assert report.moved is not None and same.moved is not None and report.moved.kl > 10 * same.moved.kl


@pytest.mark.parametrize("trained_part", ["embed_tokens", "lm_head"])
def test_into_the_original_weights_of_a_tied_base_that_training_untied(trained_part, tmp_path):
    base = trained(tmp_path, "qwen2", DENSE, model={"tie_word_embeddings": True}, modules_to_save=[trained_part])
    ours = logits(base.model)
    merge(tmp_path / "adapter", tmp_path / "out", into="original", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), ours, rtol=0, atol=2e-4)
    stored = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    weights = {"embed_tokens": merged.get_input_embeddings().weight, "lm_head": merged.get_output_embeddings().weight}
    assert {name: torch.equal(weight, stored) for name, weight in weights.items()} == {
        name: name != trained_part for name in weights
    }


def test_everything_needed_lies_beside_the_weights(tmp_path):
    template = "{% for m in messages %}<{{ m['content'] }}><|endoftext|>{% endfor %}"
    trained(tmp_path, extras={peft.TEMPLATE: template}, compute=torch.bfloat16)
    report = merge(tmp_path / "adapter", tmp_path / "out", shard_bytes=100_000)
    names = set(os.listdir(tmp_path / "out"))
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    } <= names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert report.shards == len({*index["weight_map"].values()}) > 1
    assert index["metadata"]["total_size"] == report.bytes
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert set(ends) == {256, 258}  # what the template puts after a turn, and the tokenizer's own
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config and "halfbyte" not in json.dumps(config)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(IDS, max_new_tokens=2)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "cache", "out"]


def test_the_report_says_what_was_done(tmp_path):
    trained(tmp_path, targets=["q_proj"])
    report = merge(tmp_path / "adapter", tmp_path / "out", probe=None)
    assert report.merged == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert report.moved is None and "no probe" in report.note and report.into == "dequantised"


def test_a_comparison_that_does_not_fit_memory_is_skipped_and_says_so(tmp_path, monkeypatch):
    trained(tmp_path)
    monkeypatch.setattr(machine, "ram", lambda: machine.Device("CPU", 1000, 2000))
    report = merge(tmp_path / "adapter", tmp_path / "out")
    assert report.moved is None and "GiB of memory" in report.note


def test_a_directory_with_something_in_it_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not empty"):
        merge(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(RecipeError, match="into 'gguf'"):
        merge(tmp_path / "nowhere", tmp_path / "out2", into="gguf")


def test_an_interrupted_merge_leaves_nothing(tmp_path):
    trained(tmp_path)

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "adapter", tmp_path / "out", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "cache"]


def test_an_adapter_of_peft_needs_a_base_named(tmp_path):
    base = trained(tmp_path)
    ours = logits(base.model)
    (tmp_path / "adapter" / peft.RECORD).unlink()
    with pytest.raises(CheckpointError, match="does not say on which base"):
        merge(tmp_path / "adapter", tmp_path / "out")
    again = huggingface.load(str(tmp_path / "base"), NF4, torch.float32)
    merge(tmp_path / "adapter", tmp_path / "out", base=again, dtype=torch.float32)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), ours, rtol=0, atol=2e-4)


def test_a_changed_base_is_refused(tmp_path):
    trained(tmp_path)
    save_tiny(tmp_path / "base", "llama", seed=5)
    with pytest.raises(CheckpointError, match="another base"):
        merge(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2", "falcon", "gemma2"])
def test_generation_with_a_cache_equals_decoding_without_on_a_loaded_base(family, tmp_path):
    """The adopted decoder layers and the registered attention must hand the cache on."""
    base = trained(tmp_path, family)
    answer = generate(base, "Once upon a time, there", max_tokens=30)
    ids = base.tokenizer("Once upon a time, there")["input_ids"]
    for _ in range(answer.tokens):
        ids.append(logits(base.model, torch.tensor([ids]))[0, -1].argmax().item())
    assert base.tokenizer.decode(ids[answer.prompt_tokens :], skip_special_tokens=True) == answer.text


def test_moved_is_zero_for_the_same_and_counts_what_differs():
    a = torch.randn(10, 50)
    assert (moved(a, a).max_abs, moved(a, a).kl, moved(a, a).top1) == (0, 0, 1)
    b = a.clone()
    b[0] = -a[0]
    assert moved(a, b).top1 == 0.9 and moved(a, b).kl > 0
    assert moved(a, a + 3).kl < 1e-9 and abs(moved(a, a + 3).mean_abs - 3) < 1e-5
