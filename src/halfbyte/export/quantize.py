"""A base as a bitsandbytes 4-bit checkpoint: what `halfbyte quantize MODEL --format nf4 --out DIR` writes.

Why this layout: transformers, PEFT, vLLM and every tool on top of them read it, so the exact bytes that an adapter was trained
on can serve elsewhere. Every linear layer that stays in 16 bits is listed in the config: a list given there replaces transformers'
own, and a layer that is on neither is taken for a packed one. Cost: the packed model in memory, one tensor more while writing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoints import atomic, bnb, huggingface, shards
from halfbyte.checkpoints.base import Base, Progress, silent
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats.config import FormatConfig
from halfbyte.layers.linear import Linear4bit

SHARD = 4 << 30


@dataclass(frozen=True)
class Exported:
    """directory, files: what was written. packed: number of 4-bit layers. kept: linear layers left dense. bytes: of all weights."""

    directory: Path
    files: list[str]
    packed: int
    kept: list[str]
    bytes: int

    def __str__(self) -> str:
        kept = f"; kept in 16 bits: {', '.join(self.kept)}" if self.kept else ""
        return f"{self.packed} linear layers packed{kept}; {self.bytes:,} bytes in {', '.join(self.files)}"


def export(
    model: ModelConfig | str,
    fmt: FormatConfig,
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Exported:
    """Quantises `model` and writes it to the new directory `out`; `dtype` is that of everything that is not packed.

    Raises FormatError unless `fmt` is nf4 or fp4, CheckpointError if `out` exists or the model does not load.
    """
    if fmt.kind not in bnb.LEVELS:
        hint = f"use one of {', '.join(bnb.LEVELS)}"
        raise FormatError(f"bitsandbytes files hold no {fmt.kind}, so it cannot be exported", hint=hint, code="export.format")
    if fmt.head != "16bit":
        raise FormatError("an exported model keeps its output head in 16 bits", hint="leave `head` out", code="export.format")
    refuse_existing(out)
    return save(huggingface.load(model, fmt, dtype, device, progress), out)


def save(base: Base, out: Path) -> Exported:
    """Writes a loaded base; its packed bytes are written as they are."""
    with atomic.directory(out) as folder:
        tensors = list(_tensors(base.model))
        files = shards.write_sharded(folder, tensors, SHARD)
        kept = unpacked_linears(base.model)
        _write_config(base, folder, kept)
        base.tokenizer.save_pretrained(folder)
        if base.model.generation_config is not None:
            base.model.generation_config.save_pretrained(folder)
    size = sum(tensor.nbytes for _, tensor in tensors)
    return Exported(out, files, len(base.report.packed), kept, size)


def refuse_existing(out: Path) -> None:
    """Raises CheckpointError if `out` is there already: nothing is ever overwritten or mixed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty", hint="name a new directory, or remove this one first", code="export.exists")


def unpacked_linears(model: nn.Module) -> list[str]:
    """Paths of the linear modules that bitsandbytes would quantise and that are not packed here."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, Linear4bit)
    ]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in the file; tied ones once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield from bnb.stored(f"{path}.weight", module.packed)
        own = {"bias": module.bias} if isinstance(module, Linear4bit) else dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter
    persistent = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def _write_config(base: Base, directory: Path, kept: list[str]) -> None:
    """config.json with the quantisation settings that transformers + bitsandbytes write themselves."""
    config = copy.deepcopy(base.model.config)
    config.architectures = [type(base.model).__name__]
    config._name_or_path = ""
    raw: dict[str, Any] = json.loads(config.to_json_string())
    raw["quantization_config"] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(base.compute)[6:],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": base.format.kind,
        "bnb_4bit_use_double_quant": base.format.nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
