"""What the tests of layers and adapters share: pairs of models that must agree, and packed rows."""

from __future__ import annotations

import copy
import warnings

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.formats.packed import Format
from halfbyte.layers import forward, swap
from halfbyte.layers.linear import Linear4bit
from support import tiny_model

FUSED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi", "gpt2", "falcon", "olmo2", "granite"),
    *("cohere", "cohere2", "smollm3", "stablelm", "starcoder2", "glm4"),
)
"""Families that run on the fused layer (`layers.fused`)."""
ADOPTED = (*FUSED, "falcon-new", "falcon-sequential", "gpt_neox", "cohere-qk-norm")
"""Families that run on the generic layer."""
LEFT = {
    "gptj": "its MLP was not found among its submodules (0 candidates)",
    "hunyuan": "its attention has an unknown submodule: query_layernorm, key_layernorm",
}
"""Families whose layers stay transformers' own, linear by linear, and why."""
NF4 = Format("nf4", 64, True)
STILL = {"gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}
"""What makes a family's base draw no dropout of its own."""
LENGTHS = (7, 16, 1, 10)
"""Documents of the packed row that a layer is proven on."""


def pair(family: str, fmt: Format | None, **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(ours, plain): ours is packed and adopted; plain is transformers' own and carries the same, decoded weights."""
    plain = tiny_model(family, **changes)
    plain.set_attn_implementation("eager")
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("sdpa" if family != "gemma2" else "eager")
    swap.pack(ours, None, fmt)
    with torch.no_grad():
        for path, module in ours.named_modules():
            if isinstance(module, Linear4bit):
                weight = plain.get_submodule(path).weight
                weight.copy_(module.weight if weight.shape == module.weight.shape and family != "gpt2" else module.weight.T)
    swap.adopt(ours)
    return ours, plain


def with_adapters(ours: PreTrainedModel, plain: PreTrainedModel) -> tuple[lora.Adapter, peft.PeftModel]:
    """The same random adapter on both: ours, and PEFT's."""
    adapter = lora.attach(ours, AdapterConfig(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.1)
    leaves = sorted({path.rpartition(".")[2] for path in adapter.layers})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=leaves, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out for Conv1D by itself, and says so
        reference = peft.get_peft_model(plain, config)
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            theirs = reference.base_model.model.get_submodule(path)
            theirs.lora_A["default"].weight.copy_(layer.lora_a)
            theirs.lora_B["default"].weight.copy_(layer.lora_b)
    return adapter, reference.eval()


def peft_gradients(reference: peft.PeftModel) -> dict[str, Tensor]:
    """Gradients by the names that our adapter uses."""
    found = {}
    for path, module in reference.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            found[f"{path}.lora_a"] = module.lora_A["default"].weight.grad
            found[f"{path}.lora_b"] = module.lora_B["default"].weight.grad
    return found


def row(lengths: tuple[int, ...], vocabulary: int = 250, padding: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A packed row: ids `[1, S]`, positions `[1, S]`, int32 boundaries padded with S."""
    total = sum(lengths)
    ids = torch.randint(0, vocabulary, (1, total), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return ids, positions, torch.tensor([0, *ends, *[total] * padding], dtype=torch.int32)


def learned(config: AdapterConfig, family: str = "llama", fmt: Format | None = NF4) -> tuple[PreTrainedModel, lora.Adapter]:
    """Our model of a family in training, with an adapter whose B is not zero, at a fixed place of its dropout."""
    model, _ = pair(family, fmt, **STILL.get(family, {}))
    return model, adapted(model, config)


def adapted(model: PreTrainedModel, config: AdapterConfig) -> lora.Adapter:
    """An adapter like that of `learned`; the model is in training."""
    adapter = lora.attach(model, config, seed=1)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.normal_(0, 0.1, generator=torch.Generator().manual_seed(layer.number))
    adapter.set_dropout_state(5, 2, 0, tokens=17)
    model.train()
    return adapter


def hidden_of(model: PreTrainedModel) -> Tensor:
    """Hidden states of the packed row."""
    return forward.hidden_states(model, *row(LENGTHS))


def weight_of(hidden: Tensor) -> Tensor:
    """What hidden states are multiplied by to make one number."""
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))


def gradients_of(model: PreTrainedModel, adapter: lora.Adapter) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Hidden states of the packed row, and the adapter's gradients by name."""
    for _, p, _ in adapter.parameters():
        p.grad = None
    hidden = hidden_of(model)
    (hidden * weight_of(hidden)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p, _ in adapter.parameters()}
