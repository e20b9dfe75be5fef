"""Arguments turned into what the library takes: sections, devices, number types, tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from halfbyte.errors import RecipeError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PreTrainedTokenizerBase

    from halfbyte.checkpoints.config import ModelConfig

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

    return description.read(hub.locate(model).path).tokenizer
