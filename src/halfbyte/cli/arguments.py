"""Arguments turned into what the library takes: sections, devices, number types, models with or without an adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halfbyte.cli.console import Loading, say
from halfbyte.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from transformers import PreTrainedTokenizerBase

    from halfbyte.adapters.lora import Adapter
    from halfbyte.checkpoints.base import Base
    from halfbyte.checkpoints.config import ModelConfig
    from halfbyte.checkpoints.peft import AdapterFiles

    S = TypeVar("S", bound=BaseModel)


def section(kind: type[S], values: dict[str, Any]) -> S:
    """A recipe section from options. Raises RecipeError in the words of a recipe."""
    from pydantic import ValidationError

    from halfbyte.mistakes import in_words

    try:
        return kind(**values)
    except ValidationError as error:
        told = in_words(error, values, kind)
        hint = "; ".join(m.hint for m in told if m.hint)
        raise RecipeError("; ".join(m.message for m in told), hint=hint, code="recipe.invalid") from error


def model_config(name: str, revision: str | None = None) -> ModelConfig:
    """Which base, as the library takes it."""
    from halfbyte.checkpoints.config import ModelConfig

    return section(ModelConfig, {"name": name, "revision": revision})


def tokenizer_of(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, without its weights."""
    from halfbyte.checkpoints import description, hub

    return description.read(hub.locate(model, weights=False).path).tokenizer


def device() -> torch.device:
    """The device to compute on: the first GPU, or the CPU; says so when more than one GPU is there."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    if (count := torch.cuda.device_count()) > 1:
        name = torch.cuda.get_device_name(0)
        say(f"{count} GPUs are here, one is used: {name} (CUDA_VISIBLE_DEVICES picks another)")
    return torch.device("cuda", 0)


def compute(asked: str, on: torch.device) -> torch.dtype:
    """The compute dtype of `--compute`; auto: bf16 on a GPU that has it, else fp16 there and fp32 on a CPU."""
    import torch

    from halfbyte.memory.parts import DTYPES

    if asked != "auto":
        known = [name for name in DTYPES if name != "fp8"]  # a way to train, not to store
        if asked not in known:
            raise RecipeError(f"`--compute` must be one of auto, {', '.join(known)}, but is `{asked}`")
        return DTYPES[asked]
    if on.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass(frozen=True)
class Loaded:
    """A base, the adapter on it (if any), and the chat template that belongs to it (None: the tokenizer's own)."""

    base: Base
    adapter: Adapter | None
    files: AdapterFiles | None

    @property
    def template(self) -> str | None:
        """Jinja text."""
        return self.files.template if self.files else None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that ended the answers that were learned."""
        return self.files.end_ids if self.files else ()

    @property
    def recipe(self) -> str | None:
        """The resolved recipe of the run that left it, beside the adapter or the whole model."""
        if self.files is not None:
            return self.files.recipe
        beside = self.base.source / "recipe.yaml"
        return beside.read_text(encoding="utf-8") if beside.is_file() else None


def adapter_directory(target: str) -> Path | None:
    """The adapter that `target` is (directory or Hub id) or holds (a run's output directory); None for a base model."""
    from halfbyte.checkpoints import hub, peft

    path = Path(os.path.expanduser(target))  # os.path: Path raises for an unknown user
    for folder in (path, path / "adapter"):
        if (folder / peft.CONFIG).is_file():
            return folder
    return hub.adapter(target)


def load(target: str, kind: str, model: str | None, asked_compute: str, *, other_base: bool = False) -> Loaded:
    """Loads a base model (or a run's whole trained one), or an adapter with the base it was trained on.

    kind: format of a base without a record. model: another place of the base than the record's. other_base: allow other weights.
    """
    from halfbyte.checkpoints import huggingface, peft
    from halfbyte.formats.config import FormatConfig

    on = device()
    folder = adapter_directory(target)
    if folder is None:
        trained = Path(os.path.expanduser(target)) / "model"
        name = str(trained) if (trained / "config.json").is_file() else target
        with Loading() as loading:
            fmt = section(FormatConfig, {"kind": kind})
            return Loaded(huggingface.load(model_config(name), fmt, compute(asked_compute, on), on, loading.progress), None, None)
    files = peft.read(folder)
    base = base_of(files, kind, model, asked_compute, on)
    return Loaded(base, peft.load(folder, base, other_base=other_base), files)


def base_of(files: AdapterFiles, kind: str, model: str | None, asked_compute: str, on: torch.device) -> Base:
    """The base of an adapter, as its record says; what the record does not say, or the user says otherwise, from the options."""
    import torch

    from halfbyte.checkpoints import huggingface
    from halfbyte.formats.config import FormatConfig

    record = files.record
    name = model or files.base_name
    if name is None:
        raise RecipeError(f"{files.directory} does not say which base it was trained on", hint="name it: --model")
    revision = None if model else record.revision if record else files.config.get("revision")
    fmt = section(FormatConfig, record.format if record else {"kind": kind})
    dtype = getattr(torch, record.compute) if record and asked_compute == "auto" else compute(asked_compute, on)
    with Loading() as loading:
        return huggingface.load(model_config(name, revision), fmt, dtype, on, loading.progress)
