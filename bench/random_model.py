"""Llama checkpoints with random weights in the shapes of `shapes.py`: DIR/SIZE-LAYERS in bitsandbytes' nf4, DIR/SIZE-LAYERS-dense
in bf16. Seconds on a GPU; 6 GB of disk for 8B in 4 bits, 16 GB in 16.

The models of two and four layers that prove gradients and count launches have a small vocabulary. A folder made here carries a
mark, and only such a folder is ever removed again.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from engines import Case
from shapes import SIZES

SMALL_VOCABULARY = 49_152
MARK = ".random-weights"


def exists(folder: Path) -> bool:
    """Whether a whole checkpoint is there; the mark is written last."""
    return (folder / MARK).exists()


def remove(root: Path, keep: set[Path]) -> list[str]:
    """Removes what was made below `root` and is not in `keep`; returns the names."""
    old = [mark.parent for mark in sorted(root.glob(f"*/{MARK}")) if mark.parent not in keep]
    for folder in old:
        shutil.rmtree(folder)
    return [folder.name for folder in old]


def make(case: Case, root: str, tokenizer_folder: str | None) -> dict[str, Any]:
    """Writes the checkpoint that `case` reads, weights from seed 0."""
    assert tokenizer_folder, f"{case.directory(root)} is missing, and --tokenizer names no tokenizer's folder to make it with"
    import torch
    from gputime import DEVICE
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape, start, folder = SIZES[case.size], time.perf_counter(), case.directory(root)
    layers = case.layers or shape.layers
    proves = case.size in ("8b", "tiny") and layers != shape.layers
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = tokenizer.unk_token  # not the end of an answer: that one is learned
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=SMALL_VOCABULARY if proves else shape.vocabulary,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if case.dense:
        model.save_pretrained(folder, max_shard_size="4GB")
        tokenizer.save_pretrained(folder)
    else:
        _in_four_bits(model, tokenizer, case.size, folder)
    (folder / MARK).touch()
    return {"made": folder.name, "seconds": round(time.perf_counter() - start, 1)}


def _in_four_bits(model: Any, tokenizer: Any, name: str, folder: Path) -> None:
    import torch

    from halfbyte.checkpoints.base import Base
    from halfbyte.export import quantize as export
    from halfbyte.formats.config import FormatConfig
    from halfbyte.formats.packed import Format
    from halfbyte.layers import swap

    report = swap.pack(model, None, Format("nf4", 64, nested=True))
    export.save(Base(model, tokenizer, name, None, FormatConfig(), torch.bfloat16, "", report, folder), folder)
