"""Recipe section `data`: what is learned from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from halfbyte.config_base import Section

Shape = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "unpaired"]
Name = Literal["system", "user", "assistant", "tool"]


class SourceConfig(Section):
    """One source of examples."""

    path: str
    """A file (JSONL, JSON, CSV, Parquet, Arrow, text), a directory, a pattern, a Hub dataset id, or `python-docs`."""
    shape: Shape = "auto"
    """messages | sharegpt | alpaca | prompt_completion | text | preference | unpaired, or auto: from the columns, and reported."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns by other names, ours first: `{instruction: question, output: answer}`; `a.b` reaches into an object. A column
    named as `weight` is the weight of an example's tokens in the loss."""
    keys: dict[Literal["role", "content"], str] = Field(default_factory=dict)
    """Keys of a turn where they are unusual: `{role: speaker, content: utterance}`."""
    roles: dict[str, Name] = Field(default_factory=dict)
    """Roles by other names: `{customer: user, agent: assistant}`."""
    learn: Literal["all", "chosen"] = "all"
    """chosen: of preference data, learn the preferred answers (pairs), or those marked good (labels), as ordinary examples."""
    group: str | None = None
    """Column that says what belongs together (a conversation, a user): a group is never both learned and held out."""
    split: str = "train"
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration (subset) of a Hub dataset."""
    revision: str | None = None
    """Commit of a Hub dataset."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch visits this source: 0.2 takes a fifth of it, 2 takes it twice."""
    count: int | None = Field(default=None, ge=1)
    """Instead of `weight`: how many examples an epoch takes, others each time until all had their turn."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Instead of `weight`: this source's share of the tokens that an epoch learns. `share: 0.1` of general data against
    forgetting."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many examples."""

    @model_validator(mode="after")
    def _one_measure(self) -> SourceConfig:
        # By value: a saved recipe spells out every default, and reads back.
        fields = type(self).model_fields
        given = [name for name in ("weight", "count", "share") if getattr(self, name) != fields[name].default]
        if len(given) > 1:
            raise ValueError(f"`{'` and `'.join(given)}` are two answers to one question: keep one of them")
        return self

    @property
    def measured(self) -> bool:
        """Whether the recipe says how much of it an epoch takes."""
        return self.weight != 1 or self.count is not None or self.share is not None


class MixConfig(Section):
    """How sources of different sizes are mixed, where they do not say it themselves (`count`, `share`)."""

    temperature: float = Field(default=1.0, ge=1)
    """1 mixes by size; above it small sources come more often, sizes ** (1 / temperature); the epoch stays as long."""
    cap: int | None = Field(default=None, ge=1)
    """An epoch takes at most so many examples of one source, others each time; also the largest size that temperature sees."""


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


Learnable = Literal["system", "user", "assistant"]  # what a tool answered is never learned


class DataConfig(Section):
    """What is learned from, and how it is laid out."""

    train: Annotated[Sources, BeforeValidator(_sources, json_schema_input_type=str | list[str | SourceConfig])]
    """The sources of the training set: a list of sections, or of paths."""
    mix: MixConfig = Field(default_factory=MixConfig)
    """How sources of different sizes are mixed."""
    eval: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=1)] | Sources,
        BeforeValidator(_sources, json_schema_input_type=float | int | str | list[str | SourceConfig]),
    ] = 0.05
    """Held-out examples: a share of every training source (0 for none), a number of examples over all, or sources of their own."""
    template: str = "auto"
    """Chat template: auto (the tokenizer's own), a named one (chatml, alpaca, plain, vicuna, llama2, llama3, mistral,
    mistral-tekken, mistral-v7, gemma, phi3, zephyr), or a path to a Jinja file."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Values for what the template reads, such as `{enable_thinking: false}`; they are written into the template that is saved."""
    system: str | None = None
    """System message for examples that have none."""
    loss_on: Literal["assistant", "last", "each", "all"] | Annotated[list[Learnable], Field(min_length=1)] = "assistant"
    """Which tokens are learned: every assistant turn, the last one only, each as the end of an example of its own (for templates
    that strip earlier thoughts), everything but tool results, or a list of roles."""
    tokens: int = Field(default=2048, ge=16)
    """Row length: every row holds exactly so many tokens."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that tokenise; 0: this one alone; null: this one and, for large sources, one more on every other core."""
    too_long: Literal["drop", "truncate_right", "truncate_left", "split", "error"] = "drop"
    """What happens to an example longer than a row; plain text is always split. truncate_right loses the end of it, truncate_left
    the beginning."""
    check: CheckConfig = Field(default_factory=CheckConfig)
    """What is looked for before the first step."""

    @property
    def sources(self) -> list[SourceConfig]:
        """All that are read: of the training set, then held-out ones of their own."""
        return [*self.train, *(self.eval if isinstance(self.eval, list) else ())]

    @field_validator("eval")
    @classmethod
    def _read_whole(cls, value: float | int | list[SourceConfig]) -> float | int | list[SourceConfig]:
        if isinstance(value, list) and any(source.measured for source in value):
            raise ValueError("a held-out source has no `weight`, `count` or `share`: it is read whole, once")
        return value

    @field_validator("train")
    @classmethod
    def _shares(cls, value: list[SourceConfig]) -> list[SourceConfig]:
        shares = [source.share for source in value if source.share is not None]
        if sum(shares) >= 1 or len(shares) == len(value) > 0:
            raise ValueError("`share` says what one source adds to others: shares come to less than 1, and one source has none")
        return value
