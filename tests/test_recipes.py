"""Every recipe that ships loads, is short, and plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.memory.plan import plan
from halfbyte.recipe import load_recipe
from support import QWEN3_8B, SMOLLM2

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
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
