"""`halfbyte plan`: what a run needs, byte by byte, and whether it fits."""

from __future__ import annotations

from pathlib import Path

import typer


def plan(
    recipe: str | None = typer.Argument(None, help="Recipe file; left out with --model.", show_default=False),
    overrides: list[str] = typer.Argument(None, help="Changes to it, such as data.tokens=4096.", show_default=False),
    model: str | None = typer.Option(None, "--model", "-m", help="Plan the default recipe of this model instead of a file."),
    gpu: str | None = typer.Option(None, "--gpu", help="Budget: a card such as rtx4090, or a size such as 24GiB."),
    as_json: bool = typer.Option(False, "--json", help="Print the plan as JSON."),
    timeline: Path | None = typer.Option(None, "--timeline", help="Draw the parts over one step into this .png, .svg or .pdf."),
    json_schema: bool = typer.Option(False, "--json-schema", help="Print the JSON schema of --json and stop."),
) -> None:
    """Print the bytes of every part of a run, and say yes or no: does it fit? Loads no weights.

    Data that is prepared already (`halfbyte data check`, or a run) is counted as it is: rows, steps, lengths of documents.

    \b
    halfbyte plan recipe.yaml --gpu rtx3060
    """
    from halfbyte.cli import recipes
    from halfbyte.cli.console import console, emit
    from halfbyte.memory import picture
    from halfbyte.memory.plan import chooser, settled
    from halfbyte.memory.plan import json_schema as schema
    from halfbyte.memory.table import render
    from halfbyte.train.lengths import known

    if json_schema:
        emit(schema())
        return
    file, changes = recipes.apart(recipe, overrides or [])
    data = ["python-docs"] if model and file is None else None
    chosen = recipes.resolve(file, changes, model=model, data=data)
    made = chooser(chosen, gpu, lengths=known(chosen))
    found = settled(made)
    if timeline is not None:
        picture.of_plan(timeline, made, found)
    if as_json:
        emit(found.as_dict())
    else:
        render(found, console())
    if not found.fits:
        raise typer.Exit(1)
