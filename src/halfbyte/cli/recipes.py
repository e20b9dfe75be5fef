"""How commands come by a recipe: a file with overrides, or `--model` and `--data` without one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import RecipeError

if TYPE_CHECKING:
    from halfbyte.config import Recipe


def resolve(recipe: str | None, overrides: list[str], *, model: str | None = None, data: list[str] | None = None) -> Recipe:
    """The recipe that the arguments describe. Raises RecipeError with every mistake."""
    from halfbyte.recipe import load_recipe, recipe_from

    recipe, overrides = apart(recipe, overrides)
    if recipe is not None:
        extra = ([f"model={model}"] if model else []) + ([f"data.train={data}"] if data else [])
        return load_recipe(recipe, [*extra, *overrides])
    if not model or not data:
        raise RecipeError(
            "which recipe?", hint="give a recipe file, or --model and --data without one; `halfbyte init` writes a recipe"
        )
    return recipe_from(without_file(model, data), overrides)


def apart(recipe: str | None, overrides: list[str]) -> tuple[str | None, list[str]]:
    """The file and the changes to it: without a file, the first argument is a change too."""
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        return None, [recipe, *overrides]
    return recipe, overrides


def without_file(model: str, data: list[str]) -> dict[str, Any]:
    """The recipe of `--model M --data D`: every default, and a run directory named after both."""
    name = f"{Path(model).name}-{Path(data[0]).stem}".lower().replace(" ", "-")
    return {"model": model, "data": {"train": list(data)}, "output": f"runs/{name}"}


def show(recipe: Recipe) -> None:
    """Prints the resolved recipe as YAML on stdout."""
    from halfbyte.recipe import dump

    print(dump(recipe), end="")
