"""`halfbyte inspect`: what of a model is packed, what is not and why, with bytes."""

from __future__ import annotations

import typer


def inspect(
    model: str = typer.Argument(..., help="Hub id, directory, .gguf file or smollm2-135m."),
    kind: str = typer.Option("nf4", "--format", "-f", help="Format to inspect for: nf4, fp4, int4, int8 or none."),
    skip: list[str] = typer.Option(None, "--skip", help="Modules to keep in 16 bits (pattern with *)."),  # noqa: B008
    revision: str | None = typer.Option(None, "--revision", help="Commit, tag or branch of a Hub id."),
    as_json: bool = typer.Option(False, "--json", help="Print the rows as JSON."),
) -> None:
    """Print what of a model is packed, what is not and why, with bytes. Loads no weights."""
    from halfbyte.cli.arguments import model_config, section
    from halfbyte.cli.console import console, emit
    from halfbyte.formats.config import FormatConfig
    from halfbyte.memory.inspect import inspect as look
    from halfbyte.memory.table import render_inspection

    fmt = section(FormatConfig, {"kind": kind, "skip": skip or []})
    found = look(model_config(model, revision), fmt)
    if as_json:
        emit(found.as_dict())
    else:
        render_inspection(found, console())
