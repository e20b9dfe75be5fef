"""The recipe: one file says everything about a run.

Composes the sections that the folders own (`formats/config.py`, `adapters/config.py`, ...) into `Recipe`. Torch-free, so
that `plan`, `schema` and every mistake in a recipe are instant. Reading one from YAML is `halfbyte/recipe.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from halfbyte.adapters.config import AdapterConfig
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.config_base import Section
from halfbyte.data.config import DataConfig
from halfbyte.errors import RecipeError
from halfbyte.formats.config import FormatConfig
from halfbyte.memory.config import MemoryConfig
from halfbyte.mistakes import CONTRADICTION, in_words
from halfbyte.objectives.config import LossConfig
from halfbyte.optim.config import OptimConfig
from halfbyte.train.config import LogConfig, TrainConfig

Compute = Literal["auto", "bf16", "fp16", "fp32", "fp8"]
Attention = Literal["auto", "cudnn", "flash", "flex", "sdpa"]

SHORT = {"model": "name", "format": "kind", "optim": "kind"}
"""Sections that may be written as one word, and the key which that word is the value of."""


def _short(section: str) -> BeforeValidator:
    def expand(value: Any) -> Any:
        return {SHORT[section]: value} if isinstance(value, str) else value

    types = {"model": ModelConfig, "format": FormatConfig, "optim": OptimConfig}
    return BeforeValidator(expand, json_schema_input_type=str | types[section])


class Recipe(Section):
    """A whole run. Only `model` and `data.train` have no default."""

    model: Annotated[ModelConfig, _short("model")]
    """The base: a name, or `{name: ..., revision: ...}`."""
    format: Annotated[FormatConfig, _short("format")] = FormatConfig()
    """How the base is stored: a kind, or the section in full."""
    compute: Compute = "auto"
    """Number type of activations and decoded weights: bf16, fp16 (loss scaling), fp32, fp8 (products with the frozen weights in
    e4m3, the rest in bf16; compute capability 8.9 or newer), or auto: chosen among the first three, with its reason."""
    attention: Attention = "auto"
    """How packed rows run: cudnn (rows of one length), flash, flex (compiled), sdpa, or auto: measured, with its reason."""
    adapter: AdapterConfig = AdapterConfig()
    """What learns."""
    data: DataConfig
    """What is learned from."""
    train: TrainConfig = TrainConfig()
    """How long, how fast, how often."""
    loss: LossConfig = LossConfig()
    """What is minimised."""
    optim: Annotated[OptimConfig, _short("optim")] = OptimConfig()
    """The optimizer: a kind, or the section in full."""
    memory: MemoryConfig = MemoryConfig()
    """What the plan may use."""
    log: LogConfig = LogConfig()
    """Trackers."""
    output: str = Field(default="runs/adapter", min_length=1)
    """Directory of the run: adapter, checkpoints, metrics, plot."""

    def __init__(self, **data: Any) -> None:
        """Raises RecipeError with every mistake in words."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            lines = [f"{m.message}{f' ({m.hint})' if m.hint else ''}" for m in in_words(error, data, type(self))]
            raise RecipeError("; ".join(lines), code="recipe.invalid") from error

    @model_validator(mode="after")
    def _no_contradiction(self) -> Recipe:
        if found := contradictions(self):
            raise PydanticCustomError(CONTRADICTION, "contradiction", {"mistakes": found})
        return self


def contradictions(recipe: Recipe) -> list[tuple[str, str]]:
    """Keys that cannot both hold: (dotted key, what is wrong and what to do). Only what was changed from its default
    can contradict, so that a resolved recipe, which spells out every default, reads back."""
    fmt, adapter, memory, train = recipe.format, recipe.adapter, recipe.memory, recipe.train
    full = adapter.kind == "none"
    affine = fmt.kind == "int4"
    checks = [
        (
            full and fmt.kind != "none",
            "format",
            "full fine-tuning (`adapter.kind: none`) trains the base itself: set `format: none`",
        ),
        (not affine and not fmt.symmetric, "format.symmetric", f"only int4 has zero points, and the format is {fmt.kind}"),
        (fmt.zero != "int" and not affine, "format.zero", f"only int4 has zero points, and the format is {fmt.kind}"),
        (fmt.zero != "int" and affine and fmt.symmetric, "format.zero", "a zero point needs `format.symmetric: false`"),
        (fmt.kind in ("int8", "none") and fmt.block != 64, "format.block", f"{fmt.kind} has no blocks"),
        (
            fmt.kind == "none" and fmt.head != "16bit",
            "format.head",
            "`format: none` keeps the whole base, its head too, in 16 bits",
        ),
        (fmt.kind == "none" and bool(fmt.skip), "format.skip", "`format: none` packs nothing that could be skipped"),
        (
            full and recipe.compute == "fp8",
            "compute",
            "fp8 multiplies frozen weights, and `adapter.kind: none` trains them: use bf16",
        ),
        (full and adapter.dropout > 0, "adapter.dropout", "there is no adapter (`adapter.kind: none`)"),
        (full and bool(adapter.modules_to_save), "adapter.modules_to_save", "`adapter.kind: none` trains every module already"),
        (full and recipe.optim.lora_plus != 1, "optim.lora_plus", "there is no B matrix without an adapter"),
        (
            isinstance(memory.microbatch, int) and train.batch % memory.microbatch != 0,
            "memory.microbatch",
            f"{memory.microbatch} rows do not divide the {train.batch} rows of `train.batch`",
        ),
        (
            train.patience is not None and recipe.data.eval == 0,
            "train.patience",
            "early stopping needs held-out data (`data.eval`)",
        ),
    ]
    return [(key, why) for wrong, key, why in checks if wrong]
