"""`halfbyte eval`: held-out loss of a base or an adapter."""

from __future__ import annotations

import typer


def evaluate(
    target: str = typer.Argument(..., help="Adapter or run directory, or a base model."),
    data: list[str] = typer.Option(None, "--data", "-d", help="What to evaluate on; default: the run's own held-out data."),  # noqa: B008
    as_json: bool = typer.Option(False, "--json", help="Print the scores as JSON."),
) -> None:
    """Loss, perplexity and token accuracy, with the adapter and without."""
    raise NotImplementedError
