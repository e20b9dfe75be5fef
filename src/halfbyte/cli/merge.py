"""`halfbyte merge`: adapter and base become one ordinary model."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def merge(
    adapter: str = typer.Argument(..., help="Adapter or run: a directory, or a Hub id."),
    out: Path = typer.Option(..., "--out", "-o", help="Directory to write; must not hold anything yet."),
    into: str = typer.Option("dequantised", "--into", help="dequantised (what the adapter was trained on) or original (16-bit)."),
    model: str | None = typer.Option(None, "--model", "-m", help="Base of the adapter, where it does not say or lies elsewhere."),
    kind: str = typer.Option("nf4", "--format", "-f", help="Format of the base, where the adapter does not say."),
    other_base: bool = typer.Option(False, "--other-base", help="Allow a base whose weights differ from those it was trained on."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Merge an adapter into 16-bit weights that transformers loads alone.

    Merged into the dequantised base, answers stay what they were; the report says by how much logits move on a probe text.
    """
    from halfbyte.checkpoints import hub, peft
    from halfbyte.cli.arguments import adapter_directory, base_of, device
    from halfbyte.cli.console import Loading, emit, say
    from halfbyte.errors import RecipeError
    from halfbyte.export.merge import Into
    from halfbyte.export.merge import merge as run

    if into not in ("dequantised", "original"):
        raise RecipeError(f"`--into` must be dequantised or original, but is `{into}`")
    folder = adapter_directory(adapter)
    if folder is None:
        hub.refuse(Path(os.path.expanduser(adapter)))  # os.path: Path raises for an unknown user
        raise RecipeError(f"{adapter} holds no adapter", hint="give the directory with adapter_config.json, a run's, or a Hub id")
    base = base_of(peft.read(folder), kind, model, "auto", device())
    with Loading() as loading:

        def progress(done: int, total: int) -> None:
            loading.progress("writing", done, total)

        where: Into = "original" if into == "original" else "dequantised"
        report = run(folder, out, where, base=base, other_base=other_base, progress=progress)
    if as_json:
        moved = vars(report.moved) if report.moved else None
        sizes = {"layers": len(report.merged), "bytes": report.bytes, "shards": report.shards}
        emit({"out": str(report.out), "into": report.into, **sizes, "moved": moved, "note": report.note})
        return
    say(f"merged {len(report.merged)} layers into the {report.into} base: {report.bytes:,} bytes in {report.shards} file(s)")
    say(f"{report.moved}" if report.moved else report.note)
    print(report.out)
