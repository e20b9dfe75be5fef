"""Recipe section `adapter`: what learns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from halfbyte.config_base import Section


class AdapterConfig(Section):
    """What learns on top of the base."""

    kind: Literal["lora", "none"] = "lora"
    """lora, or none: full fine-tuning of a 16-bit base (`format: none`)."""
    rank: int = Field(default=16, ge=1, le=4096)
    """Columns of A and rows of B: the adapter's capacity."""
    alpha: float = Field(default=32, gt=0)
    """The adapter's output is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are zeroed while training."""
    targets: str | list[str] = "all-linear"
    """all-linear (every linear layer but the output head), a list of module names or patterns, or a regular expression."""
    exclude: list[str] = Field(default_factory=list)
    """Module names or patterns that get no adapter although `targets` matches them."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732), so that large ranks learn as fast as small ones."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Another rank for modules whose path ends with a match of the key (a regular expression, as in PEFT)."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Another alpha for modules whose path ends with a match of the key."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base learn as well."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole and saved with the adapter (embeddings or head when new tokens were added)."""
