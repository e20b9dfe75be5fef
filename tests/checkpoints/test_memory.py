"""The promise of the loader: never a 16-bit copy of the model, measured on a synthetic checkpoint of 2 GiB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from halfbyte.checkpoints import shards
from support import save_tiny, tiny_tokenizer

MIB = 1 << 20


def synthetic(directory: Path, layers: int) -> tuple[int, int]:
    """A random bf16 checkpoint of a Llama shape in several shards; returns its bytes and those of its largest tensor."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
        pad_token_id=0,
    )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    directory.mkdir()
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    groups: list[list[str]] = [[]]
    for name in shapes:
        if sum(shapes[n].numel() * 2 for n in groups[-1]) > 400 * MIB:
            groups.append([])
        groups[-1].append(name)
    where = {}
    generator = torch.Generator().manual_seed(0)
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = [(n, torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)) for n in group]
        shards.write(directory / file, tensors, {"format": "pt"})
        where |= dict.fromkeys(group, file)
    (directory / shards.INDEX).write_text(json.dumps({"weight_map": where}))
    sizes = [shape.numel() * 2 for shape in shapes.values()]
    return sum(sizes), max(sizes)


def measure(tmp_path: Path, large: Path, env: dict[str, str]) -> dict[str, int]:
    tiny = save_tiny(tmp_path / "tiny")
    probe = Path(__file__).with_name("memory_probe.py")
    command = [sys.executable, str(probe), str(tiny), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_growth_of_anonymous_memory(tmp_path: Path, child_env: dict[str, str]) -> None:
    total, largest = synthetic(tmp_path / "large", layers=22)
    assert total > 2 << 30
    for start in ("quantised", "from the cache"):
        found = measure(tmp_path, tmp_path / "large", child_env)
        print(start, {k: f"{v / MIB:.0f} MiB" for k, v in found.items()}, f"largest {largest / MIB:.0f} MiB")
        assert found["growth"] <= found["resident"] + 4 * largest + 100 * MIB, (start, found)
        assert found["resident"] < total / 2
