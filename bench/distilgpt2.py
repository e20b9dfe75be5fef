"""The DistilGPT-2 walk-through: what quantising a small GPT-2 and putting LoRA on it does to every number.

The config of `distilgpt2` is written out here and the weights are random (no number below depends on them), so nothing is
downloaded. GPT-2 is the odd one among decoders: its linear layers are `Conv1D`, stored transposed, its q, k and v are one
matrix, and its output head is tied to the embedding.

    python bench/distilgpt2.py            # a table
    python bench/distilgpt2.py --json     # the same for a program
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.formats.packed import Format
from halfbyte.layers import swap

CONFIG = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 6, "n_head": 12}
NESTED = Format("nf4", block=64, nested=True)
ADAPTER = AdapterConfig(rank=8, alpha=16, targets=["c_attn", "c_proj", "c_fc"])


def walk_through(dtype: torch.dtype = torch.float16) -> dict[str, int | float]:
    """Builds the model in `dtype`, packs it, attaches the adapter; returns the counts. Takes seconds and 0.5 GB."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG)).to(dtype)
    before = swap.plan_packing(model, (), None)
    after = swap.pack(model, None, NESTED)
    swap.adopt(model)
    c_attn = model.transformer.h[0].attn.c_attn.packed
    adapter = lora.attach(model, ADAPTER, seed=0)
    weights = sum(row.params for row in after.packed)
    return {
        "base_parameters": before.params,
        "weights_in_4_bits": weights,
        "c_attn_weights": c_attn.numel,
        "c_attn_code_bytes": c_attn.codes.numel(),
        "c_attn_bytes": c_attn.nbytes,
        "trainable_parameters": adapter.trainable,
        "trainable_percent": round(100 * adapter.trainable / (before.params + adapter.trainable), 4),
        "bytes_before": before.bytes,
        "bytes_after": after.bytes,
        "packed_bytes_before": weights * torch.empty((), dtype=dtype).element_size(),
        "packed_bytes_after": sum(row.bytes for row in after.packed),
        "bits_per_packed_weight": round(8 * sum(row.bytes for row in after.packed) / weights, 4),
        "adapter_bytes": 4 * adapter.trainable,
        "layers_adopted": sum(type(m).__mro__[1].__name__ == "DecoderLayer" for m in model.transformer.h),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    numbers = walk_through()
    if parser.parse_args().json:
        print(json.dumps(numbers, indent=2))
        return
    for name, value in numbers.items():
        print(f"{name.replace('_', ' '):26} {value:>14,}")


if __name__ == "__main__":
    main()
