"""`halfbyte data`: check the data, and look at it, before it is learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from halfbyte.data.check.run import Checked

app = typer.Typer(help="Check the data, and look at it as the model will see it.", rich_markup_mode=None)
RECIPE = typer.Argument(None, help="Recipe file; left out with --model and --data.", show_default=False)
OVERRIDES = typer.Argument(None, help="Changes to it, such as data.loss_on=all.", show_default=False)
MODEL = typer.Option(None, "--model", "-m", help="Base model: its tokenizer and chat template are used.")
DATA = typer.Option(None, "--data", "-d", help="Training data: file, directory, Hub id or python-docs.")


@app.callback()
def data() -> None:
    """Check the data, and look at it as the model will see it."""


@app.command()
def check(
    recipe: str | None = RECIPE,
    overrides: list[str] = OVERRIDES,
    model: str | None = MODEL,
    data: list[str] = DATA,
    private: bool = typer.Option(False, "--private", help="Look for personal data and secrets too."),
    bad: Path = typer.Option(None, "--bad", help="Write the lines that are wrong to this new file, as they are."),
    fix: Path = typer.Option(None, "--fix", help="Write a repaired copy of the training data to this new .jsonl file."),
    as_json: bool = typer.Option(False, "--json", help="Print everything that was found as JSON."),
) -> None:
    """Look for every mistake that a loss curve does not show. Exit code 1 where a training would be stopped.

    \b
    halfbyte data check recipe.yaml
    halfbyte data check --model smollm2-135m --data my.jsonl --bad bad.jsonl --fix fixed.jsonl
    """
    from halfbyte.checkpoints.cache import cache_root
    from halfbyte.cli import recipes
    from halfbyte.cli.arguments import tokenizer_of
    from halfbyte.cli.console import emit, say
    from halfbyte.data.check import lines, repair, run, texts

    chosen = recipes.resolve(recipe, overrides or [], model=model, data=data)
    tokenizer = tokenizer_of(chosen.model)
    found = run.check(chosen.data, tokenizer, chosen.train.seed, cache_root(), private=private)
    if as_json:
        emit(found.as_dict())
    else:
        print("\n".join(found.findings.lines()), flush=True)
    if bad is not None:
        written, missing = lines.write(found.problems, chosen.data.sources, cache_root(), bad)
        say(f"{bad}: {written:,} wrong lines written" + (f"; {missing:,} cannot be cut out of their file" if missing else ""))
    if fix is not None:
        specials = texts.special_tokens(tokenizer)
        for source, file in zip(chosen.data.train, repair.outputs(fix, len(chosen.data.train)), strict=True):
            say("\n".join(repair.repair(source, cache_root(), specials, file).lines()))
    _leave(found)


def _leave(found: Checked) -> None:
    if found.findings.errors:
        raise typer.Exit(1)


@app.command(short_help="Show examples token by token, what is learned marked.")
def preview(
    recipe: str | None = RECIPE,
    overrides: list[str] = OVERRIDES,
    model: str | None = MODEL,
    data: list[str] = DATA,
    count: int = typer.Option(None, "--examples", "-n", min=1, help="How many examples: 3 in the terminal, 500 in a page."),
    html: Path = typer.Option(None, "--html", help="Write a page to look at in a browser, all in one file."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Show examples token by token, with what is learned marked, and counts and lengths of the whole set."""
    from halfbyte.checkpoints.cache import cache_root
    from halfbyte.cli import recipes
    from halfbyte.cli.arguments import tokenizer_of
    from halfbyte.cli.console import console, emit, say
    from halfbyte.data import preview as view

    chosen = recipes.resolve(recipe, overrides or [], model=model, data=data)
    tokenizer, seed = tokenizer_of(chosen.model), chosen.train.seed
    if html is not None:
        from halfbyte.data.page import write

        said = write.page(chosen.data, tokenizer, seed, html, title=str(recipe or chosen.model.name), examples=count or 500)
        say(f"{html}: {said}")
        return
    found = view.preview(chosen.data, tokenizer, seed, examples=count or 3, cache_dir=cache_root())
    if as_json:
        emit(found.as_dict())
    else:
        view.render(found, console())
