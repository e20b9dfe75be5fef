"""`halfbyte import`: another trainer's settings into a recipe, with a report of what became of every key."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from halfbyte.importers.convert import Imported


def import_(
    source: list[str] = typer.Argument(
        ..., help="axolotl, LLaMA-Factory, TRL or Unsloth: a YAML, JSON or shell file, or a command."
    ),
    out: Path | None = typer.Option(None, "--out", "-o", help="Recipe to write; left out, it is printed."),
    tool: str = typer.Option(
        "", "--from", help="Whose settings these are: axolotl, llamafactory, trl, unsloth. Else found from keys."
    ),
    dataset_info: str | None = typer.Option(
        None, "--dataset-info", help="LLaMA-Factory's dataset_info.json, if it lies elsewhere."
    ),
    processes: int | None = typer.Option(
        None, "--processes", min=1, help="Processes it trained with there: the batch is theirs together."
    ),
    partial: bool = typer.Option(False, "--partial", help="Write the recipe although something was refused."),
    force: bool = typer.Option(False, "--force", help="Overwrite the recipe if it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print recipe and report as JSON."),
) -> None:
    """Turn another trainer's settings into a recipe, and say what became of every key.

    \b
    halfbyte import qlora.yml --out recipe.yaml
    halfbyte import "trl sft --model_name_or_path Qwen/Qwen3-8B --dataset_name org/chats"
    """
    from halfbyte.cli.console import emit, say
    from halfbyte.errors import RecipeError
    from halfbyte.importers.convert import NAMES, convert
    from halfbyte.mistakes import nearest

    if tool and tool not in NAMES:
        guess = nearest(tool, NAMES)
        hint = f"did you mean `{guess}`?" if guess else f"one of {', '.join(NAMES)}"
        raise RecipeError(f"`--from {tool}`: no such tool", hint=hint, code="import.tool")
    if out is not None and out.exists() and not force:
        raise RecipeError(f"{out} exists", hint="--force overwrites it; or give another name")
    found = convert(source, tool, processes=processes, dataset_info=dataset_info)
    if as_json:
        emit(found.as_dict())
    else:
        for line in found.report():
            say(line)
    refused = found.of("refused")
    if refused and not partial:
        keys = ", ".join(f"`{key}`" for line in refused for key in line.keys)
        hint = "take these keys out of the source, or --partial writes the recipe without them"
        raise RecipeError(f"not imported: {keys or refused[0].why} asks for what is not built", hint=hint, code="import.refused")
    _write(found, out, as_json)


def _write(found: Imported, out: Path | None, as_json: bool) -> None:
    from halfbyte.cli.console import say

    if out is None:
        if not as_json:
            print(found.yaml(), end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(found.yaml(), encoding="utf-8")
    named = shlex.quote(str(out))
    say(f"wrote {out}; next:\n  halfbyte data preview {named}\n  halfbyte plan {named}\n  halfbyte train {named}")
