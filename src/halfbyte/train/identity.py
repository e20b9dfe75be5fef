"""What makes a run the same run: a checkpoint is resumed only where all of this is equal, so that nothing is mixed silently.

Free to change: where it goes (`output`), how long (`max_steps`, `epochs`, `max_minutes`, `patience`), how often it is watched
and saved, trackers, and settings of memory and speed (`optim.paged` and `train.graphs` are two), which do not change the
mathematics. The base and the data count
by their bytes, not by their names, so moving files is no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.config import Recipe
from halfbyte.config_base import Section

FREE_TRAIN = (
    *("max_steps", "epochs", "max_minutes", "eval_every", "save_every", "log_every"),
    *("keep", "best", "patience", "prompts", "sample_tokens", "graphs"),
)


def identity(recipe: Recipe, *, base: str, data: str, template: str, compute: str, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, by the recipe's keys. base, data: digests; template: its text; compute: what `auto` became; adapter: its modules."""
    return {
        "model (packed weights)": base,
        "data (contents)": data,
        "data.template (text)": template,
        "data.tokens": recipe.data.tokens,
        "compute": compute,
        "adapter (modules)": dict(adapter),
        **_flat("format", recipe.format),
        **_flat("adapter", recipe.adapter),
        **_flat("loss", recipe.loss),
        **{key: value for key, value in _flat("optim", recipe.optim).items() if key != "optim.paged"},
        **{key: value for key, value in _flat("train", recipe.train).items() if key.removeprefix("train.") not in FREE_TRAIN},
    }


def _flat(prefix: str, section: Section) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in section.model_dump(mode="json").items()}
