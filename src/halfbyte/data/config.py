"""Recipe section `data`: what is learned from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from halfbyte.config_base import Section

Shape = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]


class SourceConfig(Section):
    """One source of examples."""

    path: str
    """A file (JSONL, JSON, CSV, Parquet, text), a directory of them, a pattern, a Hub dataset id, or `python-docs`."""
    shape: Shape = "auto"
    """messages | sharegpt | alpaca | prompt_completion | text, or auto: recognised from the columns, and reported."""
    split: str = "train"
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration (subset) of a Hub dataset."""
    revision: str | None = None
    """Commit of a Hub dataset."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch visits this source: 0.2 takes a fifth of it, 2 takes it twice."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many examples."""


def _sources(value: Any) -> Any:
    """`train: a.jsonl` and `train: [a.jsonl, b.jsonl]` are short for a list of `{path: ...}`."""
    entries = [value] if isinstance(value, str | dict) else value
    return [{"path": e} if isinstance(e, str) else e for e in entries] if isinstance(entries, list) else entries


Sources = Annotated[list[SourceConfig], Field(min_length=1)]


class CheckConfig(Section):
    """What is looked for in the data before the first step; docs/reference/checks.md lists the checks by their ids."""

    near: float = Field(default=0.8, ge=0, le=1)
    """From which share of common three-token sequences (Jaccard) on two examples are near copies; 0 looks for exact copies only."""
    private: bool = False
    """Look for personal data and secrets."""
    ignore: list[str] = Field(default_factory=list)
    """Ids of checks whose findings are not told."""
    stop: list[str] = Field(default_factory=list)
    """Ids of checks that stop the run at their first finding."""


class DataConfig(Section):
    """What is learned from, and how it is laid out."""

    train: Annotated[Sources, BeforeValidator(_sources, json_schema_input_type=str | list[str | SourceConfig])]
    """The sources of the training set: a list of sections, or of paths."""
    eval: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | Sources,
        BeforeValidator(_sources, json_schema_input_type=float | str | list[str | SourceConfig]),
    ] = 0.05
    """Held-out examples: a share of train (0 for none), or sources of their own."""
    template: str = "auto"
    """Chat template: auto (the tokenizer's own), a named one (chatml, alpaca, plain), or a path to a Jinja file."""
    system: str | None = None
    """System message for examples that have none."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are learned: every assistant turn, the last one only, or everything."""
    tokens: int = Field(default=2048, ge=16)
    """Row length: every row holds exactly so many tokens."""
    too_long: Literal["drop", "truncate", "split", "error"] = "drop"
    """What happens to an example longer than a row; plain text is always split."""
    check: CheckConfig = Field(default_factory=CheckConfig)
    """What is looked for before the first step."""

    @field_validator("eval")
    @classmethod
    def _read_whole(cls, value: float | list[SourceConfig]) -> float | list[SourceConfig]:
        if isinstance(value, list) and any(source.weight != 1 for source in value):
            raise ValueError("a held-out source has no `weight`: it is read whole, once")
        return value
