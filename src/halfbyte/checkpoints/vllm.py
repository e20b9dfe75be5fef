"""Will vLLM load this adapter? Decided from `adapter_config.json` and the names of its tensors, so before it is trained.

vLLM's loader takes plain low-rank matrices on the linear layers that it serves, and refuses the rest when the server starts:
hours after the training that could have been told. The rules are those of its `PEFTHelper` and `LoRAModel` (0.33). What only the
server knows (which modules its class of the model has) is not decided here. Cost: none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from halfbyte.adapters.checks import SHOWN, Finding

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be; 16 unless it is given."""
_DEFAULT_RANK = 16
_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_PASSED_OVER = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
_SAVED = ("classifier", "score")
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of B",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "rows of single tokens",
}
_MERGE = "or serve the merged model: `halfbyte merge`"


def rank_of(config: Mapping[str, Any]) -> int:
    """The largest rank of any module."""
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def flags(config: Mapping[str, Any]) -> str:
    """The server's options for this adapter."""
    room = next((rank for rank in RANKS if rank >= rank_of(config)), RANKS[-1])
    return "--enable-lora" + (f" --max-lora-rank {room}" if room > _DEFAULT_RANK else "")


def obstacles(config: Mapping[str, Any], tensors: Iterable[str] = ()) -> list[Finding]:
    """Why vLLM would refuse the adapter; empty when it would load it with `flags`.

    config: PEFT's `adapter_config.json`. tensors: names in `adapter_model.safetensors`.
    """
    return [*_refused(config), *_unread(config, tensors)]


def _refused(config: Mapping[str, Any]) -> Iterator[Finding]:
    if (rank := rank_of(config)) > RANKS[-1]:
        hint = f"lower `adapter.rank` (and `adapter.rank_pattern`), {_MERGE}"
        yield Finding(f"vLLM takes ranks up to {RANKS[-1]}, and this adapter has {rank}", hint=hint, code="adapter.vllm-rank")
    if variants := [name for key, name in _VARIANTS.items() if config.get(key)]:
        hint = f"train a plain LoRA, {_MERGE}"
        yield Finding(f"vLLM does not load {', '.join(variants)}", hint=hint, code="adapter.vllm-variant")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _INITS:
        hint = f"convert it to plain LoRA when saving it, {_MERGE}"
        yield Finding(
            f"vLLM does not load adapters begun with `{init}`, which changes the base", hint=hint, code="adapter.vllm-variant"
        )
    if (bias := config.get("bias", "none")) != "none":
        hint = f"`adapter.bias: none`, {_MERGE}"
        yield Finding(f"vLLM loads no biases, and `adapter.bias` is {bias}", hint=hint, code="adapter.vllm-bias")
    if saved := [name for name in config.get("modules_to_save") or [] if name.rpartition(".")[2] not in _SAVED]:
        names, hint = ", ".join(saved[:SHOWN]), f"leave them out, {_MERGE}"
        yield Finding(
            f"vLLM loads no modules trained whole (`adapter.modules_to_save`: {names})", hint=hint, code="adapter.vllm-modules"
        )


def _unread(config: Mapping[str, Any], tensors: Iterable[str]) -> Iterator[Finding]:
    """Tensors that no rule of its loader reads, beyond those that were told as biases or whole modules."""
    told = config.get("bias", "none") != "none" or bool(config.get("modules_to_save"))
    strange = [n for n in tensors if not n.endswith((*_SUFFIXES, *_PASSED_OVER))]
    if strange and not told:
        message = f"vLLM does not read these tensors: {', '.join(strange[:SHOWN])}"
        yield Finding(message, hint=f"save the adapter as plain LoRA, {_MERGE}", code="adapter.vllm-tensors")
