"""Arguments turned into what the library takes: sections, devices, number types, models with or without an adapter."""

from __future__ import annotations

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
        if asked not in DTYPES:
            raise RecipeError(f"`--compute` must be one of auto, {', '.join(DTYPES)}, but is `{asked}`")
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


def adapter_directory(target: str) -> Path | None:
    """The adapter directory that `target` is, or holds (a run's output directory); None for a base model."""
    from halfbyte.checkpoints import peft

    for folder in (Path(target), Path(target) / "adapter"):
        if (folder / peft.CONFIG).is_file():
            return folder
    return None


def load(target: str, kind: str, model: str | None, asked_compute: str) -> Loaded:
    """Loads a base model, or an adapter directory with the base it was trained on.

    kind: format of a base without a record. model: another base than the record's.
    """
    from halfbyte.checkpoints import huggingface, peft
    from halfbyte.export.merge import load_base
    from halfbyte.formats.config import FormatConfig

    on = device()
    folder = adapter_directory(target)
    with Loading() as loading:
        if folder is None:
            fmt = section(FormatConfig, {"kind": kind})
            return Loaded(huggingface.load(model_config(target), fmt, compute(asked_compute, on), on, loading.progress), None, None)
        files = peft.read(folder)
        if files.record is None or model:
            name = model or files.base_name
            if name is None:
                raise RecipeError(f"{folder} does not say which base it was trained on", hint="name it: --model")
            fmt = section(FormatConfig, files.record.format if files.record else {"kind": kind})
            base = huggingface.load(model_config(name), fmt, compute(asked_compute, on), on, loading.progress)
        else:
            base = load_base(files, on)
        return Loaded(base, peft.load(folder, base), files)
