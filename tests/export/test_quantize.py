"""bitsandbytes checkpoints both ways: what we write transformers + bitsandbytes loads, what they write we load, byte for byte.

The library's CPU path has traps, so the models here have K a multiple of the block and N of 32, and its layers run in training mode
(in eval mode it repacks its weights in place and loses bits).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from halfbyte.checkpoints import huggingface, shards
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.export import quantize
from halfbyte.formats.config import FormatConfig
from support import save_tiny, tiny_tokenizer

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*kernels.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes"),
]
SHARED = os.environ.get("HALFBYTE_CACHE", str(Path.home() / ".cache" / "halfbyte"))
IDS = torch.arange(1, 20)[None]
SHAPES = {"llama": {"intermediate_size": 128}, "gpt2": {}, "qwen2": {"intermediate_size": 128, "tie_word_embeddings": True}}
FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))


def theirs(directory: Path, **settings: object) -> PreTrainedModel:
    """The model as transformers + bitsandbytes load it, in training mode without dropout."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def assert_same_logits(ours: PreTrainedModel, other: PreTrainedModel) -> None:
    torch.testing.assert_close(ours(IDS).logits, other(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.cpu
@pytest.mark.parametrize(("kind", "nested"), FORMATS)
@pytest.mark.parametrize("family", SHAPES)
def test_ours_loads_there(family: str, kind: str, nested: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", family, **SHAPES[family])
    fmt = FormatConfig(kind=kind, nested=nested)  # type: ignore[arg-type]
    done = quantize.export(str(source), fmt, tmp_path / "q", dtype=torch.float32)
    assert done.files == ["model.safetensors"] and done.packed == (8 if family == "gpt2" else 14)
    ours = huggingface.load(str(source), fmt, torch.float32).model
    assert_same_logits(ours, theirs(tmp_path / "q"))
    assert AutoTokenizer.from_pretrained(tmp_path / "q").chat_template == tiny_tokenizer().chat_template


@pytest.mark.cpu
@pytest.mark.parametrize(("kind", "nested"), FORMATS)
@pytest.mark.parametrize("family", SHAPES)
def test_theirs_loads_here_and_comes_back_byte_for_byte(family: str, kind: str, nested: bool, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    source = save_tiny(tmp_path / "m", family, **SHAPES[family])
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.float32
    )
    model = theirs(source, quantization_config=settings)
    model.save_pretrained(tmp_path / "t")
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    base = huggingface.load(str(tmp_path / "t"), FormatConfig(), torch.float32)
    assert (base.format.kind, base.format.block, base.format.nested) == (kind, 64, nested)
    assert len(base.report.packed) == (8 if family == "gpt2" else 14)
    assert_same_logits(base.model, model)
    quantize.save(base, tmp_path / "back")
    first, second = shards.open_directory(tmp_path / "t"), shards.open_directory(tmp_path / "back")
    assert first.headers() == second.headers()
    assert [name for name in first.headers() if not torch.equal(first.read(name), second.read(name))] == []


def test_the_skip_list_is_whole(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", **SHAPES["llama"])
    fmt = FormatConfig(skip=["model.layers.0.mlp"])
    done = quantize.export(str(source), fmt, tmp_path / "q", dtype=torch.float32)
    expected = ["lm_head", *(f"model.layers.0.mlp.{n}" for n in ("down_proj", "gate_proj", "up_proj"))]
    assert sorted(done.kept) == expected
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert sorted(config["quantization_config"]["llm_int8_skip_modules"]) == expected
    there = theirs(tmp_path / "q")
    assert type(there.lm_head) is type(there.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert_same_logits(huggingface.load(str(tmp_path / "q"), FormatConfig(), torch.float32).model, there)
    reasons = {row.path: row.reason for row in huggingface.load(str(tmp_path / "q"), FormatConfig(), torch.float32).report.kept}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "the checkpoint keeps it in 16 bits"


@pytest.mark.parametrize(("kind", "nested"), FORMATS)
def test_inspect_tells_a_packed_checkpoint_from_its_config(kind: str, nested: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", **SHAPES["llama"])
    fmt = FormatConfig(kind=kind, nested=nested, skip=["*.o_proj"])  # type: ignore[arg-type]
    quantize.export(str(source), fmt, tmp_path / "q", dtype=torch.float32)
    loaded = huggingface.load(str(tmp_path / "q"), FormatConfig(), torch.float32).report
    (tmp_path / "q" / "model.safetensors").unlink()
    report = huggingface.inspect(str(tmp_path / "q"), FormatConfig(), torch.float32)
    assert [(r.path, r.packed, r.bytes) for r in report.rows] == [(r.path, r.packed, r.bytes) for r in loaded.rows]


def test_a_packed_checkpoint_keeps_its_format(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m")
    quantize.export(str(source), FormatConfig(kind="fp4", nested=False), tmp_path / "q")
    with pytest.raises(CheckpointError, match="kind is fp4, not nf4"):
        huggingface.load(str(tmp_path / "q"), FormatConfig(kind="nf4"), torch.float32)
    with pytest.raises(CheckpointError, match="nested is False, not True"):
        huggingface.load(str(tmp_path / "q"), FormatConfig(nested=True), torch.float32)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "m")
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize.export(str(source), FormatConfig(), source)
    with pytest.raises(FormatError, match="int4"):
        quantize.export(str(source), FormatConfig(kind="int4"), tmp_path / "q")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_sharded", full)
    with pytest.raises(CheckpointError, match="No space"):
        quantize.export(str(source), FormatConfig(), tmp_path / "q")
    assert not (tmp_path / "q").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".q")] == []


def test_no_private_path_is_written(tmp_path: Path) -> None:
    quantize.export(str(save_tiny(tmp_path / "m")), FormatConfig(), tmp_path / "q")
    for file in (tmp_path / "q").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name


@pytest.mark.cpu
def test_smollm2_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model: nf4 with nested scales, read by transformers + bitsandbytes, logits within 1e-4."""
    monkeypatch.setenv("HALFBYTE_CACHE", SHARED)
    done = quantize.export("smollm2-135m", FormatConfig(), tmp_path / "q", dtype=torch.float32)
    assert done.packed == 210 and done.kept == ["lm_head"]
    ours = huggingface.load(str(tmp_path / "q"), FormatConfig(), torch.float32)
    assert_same_logits(ours.model, theirs(tmp_path / "q"))
    assert ours.model.lm_head.weight is ours.model.model.embed_tokens.weight
