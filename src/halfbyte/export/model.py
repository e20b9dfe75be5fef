"""A whole model as transformers lays it out: the words beside the weights, and a model in memory after full fine-tuning.

Why here and not `save_pretrained`: that wants every tensor in its final type at once, a second model in memory; here a tensor
is rounded to 16 bits, written and freed. Cost: one pass over the output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from halfbyte.checkpoints import atomic
from halfbyte.export import writer
from halfbyte.generate.chat import end_tokens

if TYPE_CHECKING:
    from halfbyte.checkpoints.base import Base

MODELFILE = "Modelfile"


def save(
    base: Base,
    directory: Path,
    template: str | None = None,
    extras: Mapping[str, str] | None = None,
    *,
    end_ids: Sequence[int] = (),
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = writer.SHARD_BYTES,
) -> Path:
    """Writes `base.model`, none of it packed, in `dtype`, whole or not at all; replaces a former one in `directory`.

    template: the chat template that it was trained with, kept as the tokenizer's. extras: more text files by name.
    end_ids: tokens that ended the answers that it learned.
    """
    frame = writer.skeleton(base.model)
    tied = still_tied(frame, base.model)
    with atomic.directory(directory, replace=True) as folder:
        plan = writer.entries(frame, dtype, tied)
        writer.write_weights(folder, plan, lambda name: _own(base.model, name).detach().cpu(), shard_bytes)
        write_texts(folder, base, template, dtype, untied=bool(frame.all_tied_weights_keys) and not tied, end_ids=end_ids)
        for name, text in (extras or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return directory


def still_tied(frame: PreTrainedModel, model: nn.Module) -> set[str]:
    """Names that transformers ties to another tensor, and that are the same tensor still (training can untie them)."""
    tied = {}
    for name, source in frame.all_tied_weights_keys.items():
        a, b = _own(model, name), _own(model, source)
        if a.data_ptr() == b.data_ptr():
            tied[name] = source
    return set(tied)


def _own(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf)
    return found


def write_texts(
    folder: Path, base: Base, template: str | None, dtype: torch.dtype, *, untied: bool, end_ids: Iterable[int] = ()
) -> None:
    """Config, generation config, tokenizer and chat template, as transformers reads them; and a Modelfile for Ollama."""
    config = type(base.model.config).from_dict(writer.plain_config(base.model.config))
    config.dtype = dtype
    config.architectures = [type(base.model).__name__]
    if untied:
        config.get_text_config().tie_word_embeddings = False
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    tokenizer = copy.deepcopy(base.tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    generation = copy.deepcopy(base.model.generation_config) or GenerationConfig()  # type: ignore[no-untyped-call]
    chosen = tokenizer.chat_template
    ends = sorted(end_tokens(base, chosen if isinstance(chosen, str) else None, end_ids))
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation.save_pretrained(folder)
    (folder / MODELFILE).write_text(modelfile(tokenizer.convert_ids_to_tokens(ends)), encoding="utf-8")


def modelfile(stops: Iterable[str]) -> str:
    """Ollama's description of the directory it lies in: `ollama create NAME -f Modelfile`. stops: texts that end an answer.

    It names no TEMPLATE: Ollama knows chat templates by their text and writes them in a language of its own.
    """
    return "FROM .\n" + "".join(f'PARAMETER stop """{stop}"""\n' for stop in stops)
