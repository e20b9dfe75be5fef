"""`halfbyte init`: three questions, and a recipe is written."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer

TEMPLATE = """\
# Written by `halfbyte init`. Every key and its default: docs/reference/recipe.md, or `halfbyte train {file} --show`.
model: {model}
format: {format}
data:
  train: [{{path: {data}}}]
  eval: 0.05
  tokens: {tokens}
train: {{batch: {batch}, epochs: {epochs}, lr: 2e-4}}
output: {output}
"""
QUESTIONS = {
    "model": ("Base model (Hub id, directory, .gguf file)", "smollm2-135m"),
    "data": ("Training data (file, directory, Hub dataset, python-docs)", "python-docs"),
    "format": ("Format of the base (nf4, fp4, int4, int8, none)", "nf4"),
}


def init(
    file: Path = typer.Argument(Path("recipe.yaml"), help="Recipe to write."),
    model: str | None = typer.Option(None, "--model", "-m", help="Base model: Hub id, directory, .gguf file or smollm2-135m."),
    data: str | None = typer.Option(None, "--data", "-d", help="Training data: file, directory, Hub id or python-docs."),
    kind: str | None = typer.Option(None, "--format", "-f", help="nf4, fp4, int4, int8, or none for 16-bit LoRA."),
    tokens: int = typer.Option(1024, "--tokens", min=16, help="Row length in tokens."),
    epochs: float = typer.Option(3, "--epochs", help="Passes over the data."),
    output: str | None = typer.Option(None, "--output", help="Directory of the run."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Ask nothing: take the defaults for what is not given."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file if it exists."),
) -> None:
    """Ask for a model, data and a format, and write a recipe.

    \b
    halfbyte init --yes --model Qwen/Qwen3-8B --data chats.jsonl
    """
    from halfbyte.cli.console import say
    from halfbyte.errors import RecipeError
    from halfbyte.recipe import parse, recipe_from

    if file.exists() and not force:
        raise RecipeError(f"{file} exists", hint="--force overwrites it; or give another name")
    chosen, taken = _chosen({"model": model, "data": data, "format": kind}, asking=not yes and sys.stdin.isatty())
    name = f"runs/{Path(chosen['model']).name.lower()}-{Path(chosen['data']).stem.lower()}"
    values = {key: _quoted(value) for key, value in (chosen | {"output": output or name}).items()}
    text = TEMPLATE.format(file=file, tokens=tokens, batch=8, epochs=f"{epochs:g}", **values)
    recipe_from(parse(text, str(file)).data)  # a recipe with a mistake is not written
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    if taken and not yes:
        say(f"no terminal to ask on, so these defaults were taken: {', '.join(taken)}")
    named = shlex.quote(str(file))
    say(f"wrote {file}; next:\n  halfbyte plan {named}\n  halfbyte data preview {named}\n  halfbyte train {named}")


def _chosen(given: dict[str, str | None], *, asking: bool) -> tuple[dict[str, str], list[str]]:
    """What was given, answered, or else the default; and which defaults were taken without asking."""
    chosen, taken = {}, []
    for key, (question, default) in QUESTIONS.items():
        answer = given[key] or (str(typer.prompt(question, default=default, err=True)) if asking else None)
        chosen[key] = answer or default
        if answer is None:
            taken.append(f"{key} {default}")
    return chosen, taken


def _quoted(value: str) -> str:
    """A YAML scalar: as it stands where that is safe, else quoted."""
    import json

    safe = value and all(c.isalnum() or c in "/._-" for c in value) and value[0].isalpha()
    return value if safe and value not in ("true", "false", "null") else json.dumps(value, ensure_ascii=False)
