"""What vLLM would refuse, planted one by one; and that the adapters we write by default are taken."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.adapters import lora, state
from halfbyte.adapters.config import AdapterConfig
from halfbyte.checkpoints import peft_config, vllm
from support import packed_base


def files(**settings: Any) -> tuple[dict[str, Any], list[str]]:
    base = packed_base("llama", kind="none")
    adapter = lora.attach(base.model, AdapterConfig(**settings), 0)
    return peft_config.to_peft(adapter, base), state.names(adapter)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"rank": 16}, "--enable-lora"),
        ({"rank": 3}, "--enable-lora"),
        ({"rank": 17}, "--enable-lora --max-lora-rank 32"),
        ({"rank": 8, "rank_pattern": {"q_proj": 48}}, "--enable-lora --max-lora-rank 64"),
        ({"rank": 512, "rslora": True, "alpha_pattern": {"q_proj": 4}}, "--enable-lora --max-lora-rank 512"),
    ],
)
def test_plain_adapters_are_loaded_with_these_flags(settings: dict[str, Any], flags: str) -> None:
    config, names = files(**settings)
    assert vllm.obstacles(config, names) == [] and vllm.flags(config) == flags


@pytest.mark.parametrize(
    ("settings", "code", "fix"),
    [
        ({"rank": 513}, "adapter.vllm-rank", "adapter.rank"),
        ({"rank": 8, "rank_pattern": {"q_proj": 600}}, "adapter.vllm-rank", "adapter.rank_pattern"),
        ({"bias": "all"}, "adapter.vllm-bias", "adapter.bias: none"),
        ({"modules_to_save": ["lm_head"]}, "adapter.vllm-modules", "leave them out"),
    ],
)
def test_what_a_recipe_can_ask_for_and_vllm_refuses(settings: dict[str, Any], code: str, fix: str) -> None:
    if settings.get("bias") == "all":
        base = packed_base("gpt2", kind="none")
        adapter = lora.attach(base.model, AdapterConfig(**settings), 0)
        config, names = peft_config.to_peft(adapter, base), state.names(adapter)
    else:
        config, names = files(**settings)
    (found,) = vllm.obstacles(config, names)
    assert found.code == code and fix in found.hint and "halfbyte merge" in found.hint


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "a bias of B"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"use_qalora": True}, "QALoRA"),
        ({"trainable_token_indices": [5]}, "single tokens"),
        ({"init_lora_weights": "pissa"}, "`pissa`"),
        ({"init_lora_weights": "olora"}, "`olora`"),
    ],
)
def test_variants_that_others_trained(changes: dict[str, Any], told: str) -> None:
    config, names = files(rank=4)
    (found,) = vllm.obstacles(config | changes, names)
    assert found.code == "adapter.vllm-variant" and told in found.message


def test_tensors_that_no_rule_reads() -> None:
    config, names = files(rank=4)
    strange = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    (found,) = vllm.obstacles(config, [*names, strange])
    assert found.code == "adapter.vllm-tensors" and strange in found.message
    assert vllm.obstacles(config, [*names, "base_model.model.lm_head.base_layer.weight"]) == []


def test_classifiers_and_harmless_starts_are_taken() -> None:
    config, names = files(rank=4)
    assert vllm.obstacles(config | {"modules_to_save": ["score"], "init_lora_weights": "gaussian"}, names) == []
