"""The recipe: one file says everything about a run.

Composes the sections that the folders own (`formats/config.py`, `adapters/config.py`, ...) into `Recipe`. Torch-free, so
that `plan`, `schema` and every mistake in a recipe are instant.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from halfbyte.adapters.config import AdapterConfig
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.config_base import Section
from halfbyte.data.config import DataConfig
from halfbyte.formats.config import FormatConfig
from halfbyte.memory.config import MemoryConfig
from halfbyte.optim.config import OptimConfig
from halfbyte.train.config import LogConfig, TrainConfig

Compute = Literal["auto", "bf16", "fp16", "fp32"]


class Recipe(Section):
    """A whole run. Only `model` and `data.train` have no default."""

    model: ModelConfig
    """The base: a name, or `{name: ..., revision: ...}`."""
    format: FormatConfig = FormatConfig()
    """How the base is stored: a kind, or the section in full."""
    compute: Compute = "auto"
    """Number type of activations and decoded weights: bf16, fp16 (loss scaling), fp32, or auto: chosen, with its reason."""
    adapter: AdapterConfig = AdapterConfig()
    """What learns."""
    data: DataConfig
    """What is learned from."""
    train: TrainConfig = TrainConfig()
    """How long, how fast, how often."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    memory: MemoryConfig = MemoryConfig()
    """What the plan may use."""
    log: LogConfig = LogConfig()
    """Trackers."""
    output: str = Field(default="runs/adapter", min_length=1)
    """Directory of the run: adapter, checkpoints, metrics, plot."""

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("format", mode="before")
    @classmethod
    def _format_by_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value
