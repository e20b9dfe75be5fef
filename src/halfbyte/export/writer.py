"""A transformers model directory in 16 bits, written tensor by tensor.

Why our own writer: the library's wants every tensor of a shard in memory before it writes the first; here a tensor is made,
written and freed, so that a model is merged in the memory of its largest tensor. Shapes are known beforehand from a skeleton
without weights, therefore so are the shards, their names and their headers.
Cost: one pass over the output; no copy of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoints.shards import INDEX, NAMES, SINGLE, bytes_of

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model as transformers builds it from its config, without weights: original module kinds, names and shapes."""
    config = type(model.config).from_dict(plain_config(model.config))
    with torch.device("meta"):
        return type(model)(config)


def plain_config(config: Any) -> dict[str, Any]:
    """The config as a dict, without what describes a quantised file."""
    content: dict[str, Any] = config.to_dict()
    content.pop("quantization_config", None)
    return content


def transposed_weights(frame: PreTrainedModel) -> set[str]:
    """Weights that transformers keeps as `[K, N]` (Conv1D of GPT-2)."""
    return {f"{path}.weight" for path, module in frame.named_modules() if isinstance(module, Conv1D)}


def entries(frame: nn.Module, dtype: torch.dtype, left_out: set[str]) -> list[Entry]:
    """Every tensor of the skeleton but `left_out` (the tied ones); floating point in `dtype`, the rest as it is."""
    return [
        Entry(name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in frame.state_dict().items()
        if name not in left_out
    ]


def write_weights(
    folder: Path,
    plan: list[Entry],
    make: Callable[[str], Tensor],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Writes `plan` as safetensors, sharded when it exceeds `shard_bytes`. make: gives the tensor of a name. Returns shards."""
    shards = _shards(plan, shard_bytes)
    total = sum(entry.nbytes for entry in plan)
    done = 0
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file_name).open("wb") as file:
            file.write(_header(shard))
            for entry in shard:
                tensor = make(entry.name).to(entry.dtype)
                assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)}, planned {entry.shape}"
                file.write(bytes_of(tensor))
                placed[entry.name] = file_name
                done += entry.nbytes
                if progress is not None:
                    progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(shards)


def _shards(plan: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in plan:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    # within a file wider types come first, so that each tensor is aligned to its type
    return [sorted(shard, key=lambda e: -e.dtype.itemsize) for shard in shards]


def _header(shard: list[Entry]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        span = [offset, offset + entry.nbytes]
        table[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
