"""GGUF files: config and tokenizer through transformers, tensors by our own reader, one at a time.

Why our own: transformers decodes the whole file into 16 or 32 bits before the model sees it. Here a tensor is decoded when it is
asked for, in pieces of `PIECE` elements (the `gguf` package's decoder holds its result twice), and the caller frees it.

What llama.cpp's converter changed is changed back: llama-family q and k rows interleave the two rotary halves of each head; GPT-2
stores Conv1D weights transposed. What would load without an error and answer nonsense is refused: architectures outside
`ARCHITECTURES` (others lose settings on the way, such as Gemma 2's query scale or StarCoder 2's rotary base), and rotary scaling,
which the metadata tells in a way that transformers does not read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoints.shards import Header, Tensors
from halfbyte.errors import CheckpointError

PIECE = 1 << 22
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
ROPE_TENSORS = ("rope_freqs", "rope_factors")
# What the readers of transformers and gguf raise for sizes, offsets and ids that a damaged file says of itself.
DAMAGED = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, OSError, struct.error, StrictDataclassError)
STORED = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}


def load_config(path: Path) -> PretrainedConfig:
    """The model's config, from the file's metadata. Raises CheckpointError if it is not a whole GGUF file of a known kind."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file", hint="its first four bytes should be GGUF; download it again")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except DAMAGED as error:
        raise CheckpointError(f"{path}: the metadata cannot be read: {error}", hint="is it whole, and a language model?") from error
    return config


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer and its chat template, from the file's metadata. Raises CheckpointError if there is none that can be built."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower: `Token ... out of vocabulary`
        raise CheckpointError(f"{path}: no tokenizer can be built of it: {error}", hint="is it whole? download it again") from error
    return tokenizer


class GgufTensors(Tensors):
    """The tensors of a GGUF file under the names of `model` (those without a name there keep their GGUF name).

    Raises CheckpointError for a damaged file or an architecture that is not in `ARCHITECTURES`.
    """

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        reader = _open(path)
        self._arch: str = reader.fields["general.architecture"].contents()
        if self._arch not in ARCHITECTURES:
            hint = f"GGUF architectures that load: {', '.join(ARCHITECTURES)}; for others use the safetensors checkpoint"
            raise CheckpointError(f"{path.name}: GGUF files of architecture {self._arch} are not supported", hint=hint)
        scaling = reader.fields.get(f"{self._arch}.rope.scaling.type")
        scaled = scaling is not None and scaling.contents() != "none"
        if scaled or any(t.name.startswith(ROPE_TENSORS) for t in reader.tensors):
            hint = "use the safetensors checkpoint of this model"
            message = f"{path.name} scales its rotary frequencies in a way that transformers does not read from GGUF"
            raise CheckpointError(message, hint=hint, code="gguf.rope")
        self._heads = (model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None))
        names = _names(self._arch, model)
        self._tensors = {names.get(t.name, t.name): t for t in reader.tensors}

    def headers(self) -> dict[str, Header]:
        return {name: Header(self._shape(t), STORED.get(t.tensor_type, torch.float32)) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        stored = self._tensors[name]
        weight = _decode(stored, STORED.get(stored.tensor_type, torch.float32))
        undo = UNDO.get(self._arch)
        return undo(stored.name, weight, self._heads) if undo else weight

    def _shape(self, stored: Any) -> tuple[int, ...]:
        shape = tuple(int(n) for n in reversed(stored.shape))
        return shape[::-1] if self._arch == "gpt2" and _is_conv1d(stored.name) else shape


def _open(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except DAMAGED as error:
        raise CheckpointError(f"{path} is not a GGUF file, or it is damaged: {error}", hint="download it again") from error


def _names(arch: str, model: PreTrainedModel) -> dict[str, str]:
    """GGUF tensor name to model name."""
    code = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(code, model.config.num_hidden_layers)
    names = {}
    for name in model.state_dict():
        stem, dot, suffix = name.rpartition(".")
        known = table.get_name(stem) if suffix in ("weight", "bias") else None
        if known:
            names[known + dot + suffix] = name
    return names


def _decode(stored: Any, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, decoded piece by piece."""
    shape = [int(n) for n in reversed(stored.shape)]
    out = torch.empty(shape, dtype=dtype)
    rows = out.view(-1, shape[-1])
    data = stored.data.reshape(rows.shape[0], -1)
    step = max(1, PIECE // shape[-1])
    for start in range(0, rows.shape[0], step):
        piece = gguf.dequantize(data[start : start + step], stored.tensor_type)
        rows[start : start + step] = torch.from_numpy(np.require(piece, requirements="W"))
    return out


Heads = tuple[int, int | None]


def _unpermute(name: str, weight: Tensor, heads: Heads) -> Tensor:
    """q and k rows of a llama-family model `[heads * dim, ...]`: from interleaved pairs back to two halves a head."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return weight
    n = heads[0] if ".attn_q." in name else (heads[1] or heads[0])
    pairs = weight.view(n, weight.shape[0] // n // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _is_conv1d(name: str) -> bool:
    return name.endswith(("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"))


def _untranspose(name: str, weight: Tensor, heads: Heads) -> Tensor:
    return weight.T if _is_conv1d(name) else weight


UNDO: dict[str, Callable[[str, Tensor, Heads], Tensor]] = {"llama": _unpermute, "gpt2": _untranspose}
