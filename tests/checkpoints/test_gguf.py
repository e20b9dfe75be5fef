"""GGUF files: the tensors are what transformers makes of the same file, for every architecture that is not refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.checkpoints import bundled, huggingface
from halfbyte.checkpoints.gguf import ARCHITECTURES
from halfbyte.errors import CheckpointError
from halfbyte.formats.config import FormatConfig
from halfbyte.layers.linear import Linear4bit
from support import tiny_model, tiny_tokenizer

IDS = torch.arange(1, 20)[None]
NONE = FormatConfig(kind="none")
# transformers takes these two from its own defaults, not from the file.
SHAPES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024}}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary rows, written from its definition: row 2i+h of a head is row h*dim/2+i."""
    dim = weight.shape[0] // heads
    order = [head * dim + half * (dim // 2) + i for head in range(heads) for i in range(dim // 2) for half in range(2)]
    return weight[order]


def write(path: Path, arch: str, model: PreTrainedModel, kind: gguf.GGMLQuantizationType, **extra: str) -> Path:
    """The model as llama.cpp's converter would write it; matrices in `kind`."""
    c = model.config
    out = gguf.GGUFWriter(path, arch)
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_head_count(c.num_attention_heads)
    if arch == "gpt2":
        out.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        out.add_feed_forward_length(c.intermediate_size)
        out.add_head_count_kv(c.num_key_value_heads)
        out.add_rope_dimension_count(c.head_dim if arch == "qwen3" else 16)
        out.add_rope_freq_base(c.rope_parameters["rope_theta"])
        out.add_layer_norm_rms_eps(c.rms_norm_eps)
    for key, value in extra.items():
        out.add_string(key.replace("__", "."), value)
    add_tokenizer(out, c.vocab_size)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        data = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            data = permute(data, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        if arch == "gpt2" and data.ndim == 2 and "wte" not in name and "wpe" not in name and "lm_head" not in name:
            data = np.ascontiguousarray(data.T)
        stem, _, suffix = name.rpartition(".")
        stored = kind if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        out.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(data, stored), raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def add_tokenizer(out: gguf.GGUFWriter, size: int) -> None:
    tokenizer = tiny_tokenizer()
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    names += ["ab", *(f"<|unused{i}|>" for i in range(size - len(names) - 1))]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(names)
    out.add_token_types([gguf.TokenType.NORMAL if i < 256 or i == 260 else gguf.TokenType.CONTROL for i in range(size)])
    out.add_token_merges(["a b"])
    out.add_bos_token_id(256)
    out.add_eos_token_id(258)
    out.add_pad_token_id(259)
    out.add_chat_template(str(tokenizer.chat_template))


def make(directory: Path, arch: str, kind: str = "Q8_0", **extra: str) -> Path:
    return write(directory / "tiny.gguf", arch, tiny_model(arch, **SHAPES[arch]), gguf.GGMLQuantizationType[kind], **extra)


def theirs(file: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def test_every_accepted_architecture_is_tested() -> None:
    assert set(SHAPES) == set(ARCHITECTURES)


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("arch", SHAPES)
def test_weights_are_those_of_transformers(arch: str, kind: str, tmp_path: Path) -> None:
    file = make(tmp_path, arch, kind)
    ours, expected = huggingface.load(str(file), NONE, torch.float32).model, theirs(file)
    assert ours.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    torch.testing.assert_close(ours(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_float_file_is_the_model_it_was_made_from(arch: str, tmp_path: Path) -> None:
    original = tiny_model(arch)
    model = huggingface.load(str(make(tmp_path, arch, "F32")), NONE, torch.float32).model
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_cache_carries_config_and_tokenizer(tmp_path: Path) -> None:
    file = make(tmp_path, "llama")
    first = huggingface.load(str(file), FormatConfig(), torch.float32)
    second = huggingface.load(str(file), FormatConfig(), torch.float32)
    assert any(isinstance(m, Linear4bit) for m in first.model.modules())
    assert torch.equal(first.model(IDS).logits, second.model(IDS).logits)
    text = "Hi <|im_start|> \n there é"
    assert first.tokenizer(text).input_ids == second.tokenizer(text).input_ids
    assert first.tokenizer.chat_template == second.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert first.tokenizer.special_tokens_map == second.tokenizer.special_tokens_map


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    out = gguf.GGUFWriter(tmp_path / "x.gguf", "starcoder2")
    out.add_block_count(1)
    add_tokenizer(out, 272)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    with pytest.raises(CheckpointError, match="starcoder2"):
        huggingface.load(str(tmp_path / "x.gguf"), NONE, torch.float32)


def test_rotary_scaling_is_refused(tmp_path: Path) -> None:
    file = make(tmp_path, "llama", llama__rope__scaling__type="yarn")
    with pytest.raises(CheckpointError, match="rotary frequencies"):
        huggingface.load(str(file), NONE, torch.float32)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = make(tmp_path, "llama")
    data = file.read_bytes()
    wrong_id = data.replace(b"ggml.bos_token_id\x04\0\0\0\0\x01", b"ggml.bos_token_id\x04\0\0\0\0\xff")
    endless = data[:24] + b"\xff" * 8 + data[32:]  # the length of the first key
    assert data != wrong_id
    for damaged in (b"", b"GGUX" + data[4:], data[: len(data) // 2], wrong_id, endless):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            huggingface.load(str(file), NONE, torch.float32)


@pytest.mark.slow
def test_smollm2_equals_transformers(monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(shared_cache))
    file = bundled.fetch()
    expected = theirs(file)
    base = huggingface.load(str(file), NONE, torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    assert base.report.params == 134_515_008
