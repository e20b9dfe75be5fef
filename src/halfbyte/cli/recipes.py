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
        _refuse_data(recipe)
        extra = ([f"model={model}"] if model else []) + ([f"data.train={data}"] if data else [])
        return load_recipe(recipe, [*extra, *overrides])
    if not model and not data:
        raise RecipeError(
            "which recipe?", hint="give a recipe file, or --model and --data without one; `halfbyte init` writes a recipe"
        )
    if not model or not data:
        given, missing = ("--model", "--data") if model else ("--data", "--model")
        raise RecipeError(f"`{missing}` is missing", hint=f"without a recipe file, {given} needs {missing} beside it")
    return recipe_from(without_file(model, data), overrides)


def _refuse_data(recipe: str) -> None:
    """Raises RecipeError for a file of examples. JSON may be either: YAML reads it."""
    from halfbyte.data.files import SUFFIXES, kind_of_file

    if kind_of_file(recipe) in set(SUFFIXES) - {".json"}:
        hint = f"without a recipe, data is given with a model: `--model M --data {recipe}`"
        raise RecipeError(f"{recipe} is data, not a recipe", hint=hint)


def as_setting(option: str, args: list[str]) -> str:
    """How to write the recipe's key that was given as an option, such as `--lr 1e-4`; without such a key, how keys are written."""
    from halfbyte.config import Recipe
    from halfbyte.mistakes import keys

    name = option.lstrip("-").replace("-", "_")
    key = next((key for key in keys(Recipe) if f".{key}".endswith(f".{name}")), None)
    if key is None:
        return "settings of a recipe are written without dashes, such as `train.lr=1e-4`"
    behind = [*args, ""][args.index(option) + 1] if option in args else ""
    value = behind if behind and not behind.startswith("-") else "..."
    value = next((arg.removeprefix(f"{option}=") for arg in args if arg.startswith(f"{option}=")), value)
    return f"settings of a recipe are written `{key}={value}`"


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
