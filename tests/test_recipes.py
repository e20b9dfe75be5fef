"""Every recipe that ships loads, is short, and plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from halfbyte.memory.plan import plan
from halfbyte.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
CONFIGS = {"Qwen/Qwen3-8B": QWEN3_8B, "smollm2-135m": SMOLLM2}


def test_there_are_recipes() -> None:
    assert {"quickstart.yaml", "chat-8b.yaml"} <= {p.name for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe_is_short_loads_and_plans(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    assert text.startswith("# "), "a recipe opens with what it is for"
    recipe = load_recipe(path)
    found = plan(recipe, "24GiB", config=CONFIGS[recipe.model.name])
    assert found.fits, found.table()
    assert recipe.output == f"runs/{path.stem}"
