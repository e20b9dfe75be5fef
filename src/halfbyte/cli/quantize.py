"""`halfbyte quantize`: a 4-bit checkpoint that transformers, PEFT and vLLM load."""

from __future__ import annotations

from pathlib import Path

import typer


def quantize(
    model: str = typer.Argument(..., help="Hub id, directory, .gguf file or smollm2-135m."),
    out: Path = typer.Option(..., "--out", "-o", help="Directory to write; must not hold anything yet."),
    kind: str = typer.Option("nf4", "--format", "-f", help="nf4 or fp4."),
    nested: bool = typer.Option(True, "--nested/--plain", help="Keep the scales in 8 bits as well."),
    block: int = typer.Option(64, "--block", help="Weights that share a scale."),
    skip: list[str] = typer.Option(None, "--skip", help="Modules to keep in 16 bits (pattern with *)."),
    revision: str | None = typer.Option(None, "--revision", help="Commit, tag or branch of a Hub id."),
) -> None:
    """Quantise a model and write it in bitsandbytes' layout.

    \b
    halfbyte quantize Qwen/Qwen3-8B --format nf4 --out qwen3-8b-nf4
    """
    from halfbyte.cli.arguments import device, model_config, section
    from halfbyte.cli.console import say
    from halfbyte.export.quantize import export
    from halfbyte.formats.config import FormatConfig

    fmt = section(FormatConfig, {"kind": kind, "nested": nested, "block": block, "skip": skip or []})
    report = export(model_config(model, revision), fmt, out, device=device())
    say(str(report))
    print(out)
