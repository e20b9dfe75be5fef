"""`halfbyte inspect`: what of a model is packed, what is not and why, with bytes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from halfbyte.layers.report import SwapReport

NUMBERS = ("shape", "count", "weights", "bytes")
NAME, WHY = 12, 12
"""Columns that a tensor's name, and why it is stored as it is, have at least."""


def inspect(
    model: str = typer.Argument(..., help="Hub id, directory, .gguf file or smollm2-135m."),
    kind: str = typer.Option("nf4", "--format", "-f", help="Format to inspect for: nf4, fp4, int4, int8 or none."),
    nested: bool = typer.Option(True, "--nested/--plain", help="Scales in 8 bits as well (nf4, fp4)."),
    block: int = typer.Option(64, "--block", help="Weights that share a scale."),
    skip: list[str] = typer.Option(None, "--skip", help="Modules to keep in 16 bits (pattern with *)."),
    revision: str | None = typer.Option(None, "--revision", help="Commit, tag or branch of a Hub id."),
    full: bool = typer.Option(False, "--all", help="One line a tensor instead of one a kind."),
    as_json: bool = typer.Option(False, "--json", help="Print every tensor as JSON."),
) -> None:
    """Print what of a model is packed, what is not and why, with bytes. Reads no weights.

    \b
    halfbyte inspect Qwen/Qwen3-8B --format nf4
    """
    from dataclasses import asdict

    from halfbyte.checkpoints import huggingface
    from halfbyte.cli.arguments import model_config, section
    from halfbyte.cli.console import emit
    from halfbyte.formats.config import FormatConfig

    fmt = section(FormatConfig, {"kind": kind, "nested": nested, "block": block, "skip": skip or []})
    report = huggingface.inspect(model_config(model, revision), fmt)
    if as_json:
        emit(
            {
                "model": model,
                "format": kind,
                "parameters": report.params,
                "bytes": report.bytes,
                "layers": [asdict(r) for r in report.layers],
                "tensors": [asdict(r) for r in report.rows],
            }
        )
    else:
        _print(report, full)


def _print(report: SwapReport, full: bool) -> None:
    from halfbyte.memory.table import size

    rows = [(r.path, r) for r in report.rows] if full else [(_pattern(r.path), r) for r in report.rows]
    groups: dict[tuple[str, Any], list[Any]] = {}
    for name, row in rows:
        groups.setdefault((name, (row.shape, row.packed, row.reason)), []).append(row)
    lines: list[tuple[str, ...]] = []
    for (name, (shape, packed, reason)), members in groups.items():
        weights, held = sum(r.params for r in members), sum(r.bytes for r in members)
        stored = f"packed, {8 * held / weights:.3f} bits" if packed else f"as it is: {reason}"
        lines.append((name, "x".join(map(str, shape)), str(len(members)), f"{weights:,}", size(held), stored))
    _table(lines)
    packed, kept = sum(r.bytes for r in report.packed), sum(r.bytes for r in report.kept)
    print(f"{report.params:,} parameters in {size(report.bytes)}: {size(packed)} packed, {size(kept)} as it is (in bf16);")
    print(f"all in bf16: {size(2 * report.params)}")
    layers = Counter((r.layer, r.reason) for r in report.layers)
    for (name, reason), count in layers.items():
        print(f"{count} x {name}: " + (f"left as it is: {reason}" if reason else "adopted if the probe agrees, when it is loaded"))


def _table(lines: list[tuple[str, ...]]) -> None:
    """Where the terminal is narrow, names fold and reasons wrap; numbers stay whole."""
    from rich.table import Table

    from halfbyte.cli.console import console

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("tensor", overflow="fold")
    least = NAME + WHY + 2 * len(NUMBERS) + 2
    for i, name in enumerate(NUMBERS, start=1):
        width = max(len(name), *(len(line[i]) for line in lines))
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True, min_width=width)
        least += width
    table.add_column("stored", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console(least=least).print(table)


def _pattern(path: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.*.mlp.up_proj.weight`."""
    return ".".join("*" if step.isdigit() else step for step in path.split("."))
