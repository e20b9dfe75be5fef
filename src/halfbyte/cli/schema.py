"""`halfbyte schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON schema of recipes, for editors and programs.

    Put `# yaml-language-server: $schema=recipe.schema.json` on top of a recipe, and an editor completes and checks it.
    """
    from halfbyte.cli.console import emit
    from halfbyte.config import Recipe

    emit(Recipe.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "halfbyte recipe"})
