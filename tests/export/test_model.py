"""A whole model after full fine-tuning: loads in transformers, ties kept, other linear layouts, sharded, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.adapters import full
from halfbyte.checkpoints import huggingface
from halfbyte.export import model
from halfbyte.formats.config import FormatConfig
from support import save_tiny

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_what_was_trained_loads_in_transformers(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "base", family)
    base = huggingface.load(str(tmp_path / "base"), FormatConfig(kind="none"), torch.float32)
    full.attach(base.model)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(1.01).copy_(parameter.bfloat16())
    written = model.save(base, tmp_path / "out", "{{ messages }}", {"recipe.yaml": "model: base\n"}, shard_bytes=40_000)
    loaded = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, base.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(written).chat_template == "{{ messages }}"
    assert (written / "recipe.yaml").read_text() == "model: base\n"
    index = json.loads((written / "model.safetensors.index.json").read_text())
    tied = base.model.config.tie_word_embeddings
    assert ("lm_head.weight" in index["weight_map"]) != tied, "a tied head is written once"
    model.save(base, tmp_path / "out")  # a former one is replaced
