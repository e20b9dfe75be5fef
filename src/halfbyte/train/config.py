"""Recipe sections `train` and `log`: how long, how fast, how often, and what is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from halfbyte.config_base import Section

Every = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)]


def _prompts(value: Any) -> Any:
    """The lines of a file, so that the recipe which a run stores is whole."""
    if not isinstance(value, str):
        return value
    try:
        lines = Path(value).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"`{value}` is not a text file with one question a line ({type(error).__name__})") from error
    return [line.strip() for line in lines if line.strip()]


class TrainConfig(Section):
    """How a run goes."""

    batch: int = Field(default=8, ge=1)
    """Rows in one optimizer step."""
    epochs: float = Field(default=3, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, if that comes first."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop (and save) after so many minutes of training, if that comes first."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: to zero along a cosine or a line, or not at all."""
    warmup: float = Field(default=0.03, ge=0)
    """Warm-up: a share of all steps when below 1, a number of steps otherwise."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0 never clips."""
    seed: int = Field(default=0, ge=0)
    """Seed of data order, adapter initialisation and dropout."""
    deterministic: bool = False
    """The same bits from two runs on one machine, by torch's deterministic algorithms: on a GPU slower, and an operation that has
    none is an error."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """CUDA graphs of the layers' forward and backward (fused layers on a GPU): on, off, or auto: where the first steps show that
    they are faster, as with small models and short rows, and the plan leaves room."""
    eval_every: Every = 100
    """Optimizer steps between evaluations, or below 1 a share of all steps; 0 evaluates at the start and the end only."""
    save_every: Every = 100
    """Optimizer steps between checkpoints, or below 1 a share of all steps; 0 saves at the end only."""
    log_every: int = Field(default=1, ge=1)
    """Optimizer steps between log lines."""
    keep: int = Field(default=2, ge=2)
    """Checkpoints kept besides the best one."""
    best: bool = True
    """Export the adapter of the lowest held-out loss instead of the last one."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a lower held-out loss."""
    prompts: Annotated[list[str], BeforeValidator(_prompts, json_schema_input_type=str | list[str])] = Field(default_factory=list)
    """Questions answered before, during and after the run: a list, or a text file with one a line."""
    sample_tokens: int = Field(default=48, ge=1)
    """Longest answer to such a question, in tokens."""

    def in_steps(self, total: int) -> TrainConfig:
        """The same with `eval_every` and `save_every` in steps of a run of `total`: a share is rounded up."""
        return self.model_copy(update={name: _steps(getattr(self, name), total) for name in ("eval_every", "save_every")})


def _steps(every: float, total: int) -> int:
    return math.ceil(round(every * total, 6)) if 0 < every < 1 else int(every)


class LogConfig(Section):
    """Where progress goes besides the terminal, `metrics.jsonl` and `loss.png`."""

    to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Trackers: tensorboard, wandb."""
