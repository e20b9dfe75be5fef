"""An adapter's tensors under PEFT's names, and every way in which a file can fail to fit."""

from __future__ import annotations

import pytest
import torch

from halfbyte.adapters import lora, state
from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import CheckpointError
from support import packed_base


def attached(**settings):
    base = packed_base("qwen2")
    adapter = lora.attach(base.model, AdapterConfig(rank=4, **settings), 0)
    with torch.no_grad():
        for number, (_, parameter, _) in enumerate(adapter.parameters()):
            parameter.add_(0.01 * (number + 1))
    return adapter


@pytest.mark.parametrize(
    ("name", "role", "expected"),
    [
        ("model.layers.0.q_proj.lora_a", "lora_a", "base_model.model.model.layers.0.q_proj.lora_A.weight"),
        ("model.layers.0.q_proj.lora_b", "lora_b", "base_model.model.model.layers.0.q_proj.lora_B.weight"),
        ("model.layers.0.q_proj.base_layer.bias", "no_decay", "base_model.model.model.layers.0.q_proj.base_layer.bias"),
        ("lm_head.weight", "dense", "base_model.model.lm_head.weight"),
    ],
)
def test_names_are_peft_s(name, role, expected):
    assert state.file_name(name, role) == expected


def test_round_trip_is_exact():
    saved = state.state_dict(attached(bias="lora_only", modules_to_save=["lm_head"]))
    other = attached(bias="lora_only", modules_to_save=["lm_head"])
    with torch.no_grad():
        for _, parameter, _ in other.parameters():
            parameter.zero_()
    state.load_state_dict(other, saved)
    loaded = state.state_dict(other)
    assert list(loaded) == list(saved) == sorted(saved)
    assert all(torch.equal(loaded[name], saved[name]) and loaded[name].dtype == torch.float32 for name in saved)


def test_a_mismatch_lists_every_difference_and_changes_nothing():
    adapter = attached()
    before = state.state_dict(adapter)
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    missing = [name for name in tensors if "layers.1.mlp" in name]
    for name in missing:
        del tensors[name]
    tensors["base_model.model.other.lora_A.weight"] = torch.zeros(4, 8)
    reshaped = next(name for name in tensors if name.endswith("k_proj.lora_A.weight"))
    tensors[reshaped] = torch.zeros(8, 64)
    nan = next(name for name in tensors if name.endswith("v_proj.lora_B.weight"))
    tensors[nan] = tensors[nan] * float("nan")
    with pytest.raises(CheckpointError) as caught:
        state.load_state_dict(adapter, tensors, source="here")
    text = str(caught.value)
    assert "here does not fit" in text and f"{len(missing) + 3} differences" in text
    for name in missing:
        assert f"missing: {name}" in text
    assert "unexpected: base_model.model.other.lora_A.weight [4, 8]" in text
    assert f"shape: {reshaped} is [8, 64] in the file, [4, 64] in the model" in text
    assert f"values: {nan} holds NaN" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_dict(adapter).items())


def test_bias_names_of_old_peft_are_understood():
    adapter = attached(bias="lora_only")
    tensors = {name.replace(".base_layer.bias", ".bias"): tensor for name, tensor in state.state_dict(adapter).items()}
    assert any(name.endswith("q_proj.bias") for name in tensors)
    state.load_state_dict(adapter, tensors)
