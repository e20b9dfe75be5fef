"""`halfbyte train`: a recipe in, an adapter out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from halfbyte.config import Recipe


def train(
    recipe: str | None = typer.Argument(None, help="Recipe file; left out with --model and --data.", show_default=False),
    overrides: list[str] = typer.Argument(None, help="Changes to it, such as train.lr=1e-4.", show_default=False),
    model: str | None = typer.Option(None, "--model", "-m", help="Base model: Hub id, directory, .gguf file or smollm2-135m."),
    data: list[str] = typer.Option(None, "--data", "-d", help="Training data: file, directory, Hub id or python-docs."),
    show: bool = typer.Option(False, "--show", help="Print the resolved recipe and stop."),
    as_json: bool = typer.Option(False, "--json", help="Print events as JSON to stdout, one a line; words still go to stderr."),
    memory_timeline: bool = typer.Option(
        False, "--memory-timeline", help="Record the memory of one step, and draw it over the plan's in memory.png."
    ),
) -> None:
    """Train an adapter. Run the same command again to resume a stopped run.

    \b
    halfbyte train recipe.yaml train.lr=1e-4
    halfbyte train --model smollm2-135m --data my.jsonl
    """
    from halfbyte.cli import recipes

    chosen = recipes.resolve(recipe, overrides or [], model=model, data=data)
    if show:
        recipes.show(chosen)
    else:
        _train(chosen, as_json, memory_timeline)


def _train(recipe: Recipe, as_json: bool, memory_timeline: bool) -> None:
    from dataclasses import asdict

    from halfbyte.cli.console import emit_line
    from halfbyte.train.run import train as run

    result = run(recipe, on_event=emit_line if as_json else None, memory_timeline=memory_timeline)
    if as_json:
        emit_line({"kind": "done", **asdict(result)})
