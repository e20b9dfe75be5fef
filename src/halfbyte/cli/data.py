"""`halfbyte data`: look at the data before it is learned."""

from __future__ import annotations

import typer

app = typer.Typer(help="Look at the data as the model will see it.", rich_markup_mode=None)


@app.callback()
def data() -> None:
    """Look at the data as the model will see it."""


@app.command()
def preview(
    recipe: str | None = typer.Argument(None, help="Recipe file; left out with --model and --data.", show_default=False),
    overrides: list[str] = typer.Argument(None, help="Changes to it, such as data.loss_on=all.", show_default=False),
    model: str | None = typer.Option(None, "--model", "-m", help="Base model: its tokenizer and chat template are used."),
    data: list[str] = typer.Option(None, "--data", "-d", help="Training data: file, directory, Hub id or python-docs."),
    count: int = typer.Option(3, "--examples", "-n", min=1, help="How many examples to show."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Show examples token by token, with what is learned marked, and counts and lengths of the whole set."""
    from halfbyte.cli import recipes
    from halfbyte.cli.arguments import tokenizer_of
    from halfbyte.cli.console import console, emit
    from halfbyte.data import preview as view

    chosen = recipes.resolve(recipe, overrides or [], model=model, data=data)
    found = view.preview(chosen.data, tokenizer_of(chosen.model), chosen.train.seed, examples=count)
    if as_json:
        emit(found.as_dict())
    else:
        view.render(found, console())
