"""A plan for the eye: one line a part with a bar, the sum, and yes or no. Readable without colour."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from halfbyte.memory.plan import Plan

BAR = 24


def size(count: int) -> str:
    """`3.60 GiB`, `512.0 MiB`, `884.7 KiB`."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}" if unit == "GiB" else f"{count / factor:.1f} {unit}"
    return f"{count} B"


def render(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    table.add_column("")
    table.add_column("", overflow="fold")
    scale = max(plan.bytes, 1)
    for part in plan.parts:
        table.add_row(part.name, size(part.bytes), _bar(part.bytes, scale, "cyan"), Text(part.note, style="dim"))
    table.add_row("in all", size(plan.bytes), _bar(plan.bytes, scale, "green" if plan.fits else "red"), "", style="bold")
    p = plan.parameters
    share = f"{p.trained / p.base:.2%}" if p.base else "0"
    console.print(Text(f"{plan.model}: {p.base:,} parameters, {p.packed:,} packed in {plan.format}, {p.trained:,} learn ({share})"))
    console.print(table)
    recompute = "every layer recomputed" if plan.recompute == "all" else "no recompute"
    if plan.offloaded:
        recompute += f", {size(plan.offloaded)} wait in host memory"
    if plan.paged:
        recompute += f", {size(plan.paged)} of AdamW's moments in host memory"
    rows = f"{plan.microbatch} x {plan.tokens} tokens, {plan.microbatches} a step, {recompute}, computed in {plan.compute}"
    console.print(Text(f"microbatch: {rows} ({plan.reason})"))
    verdict = Text("yes, it fits: " if plan.fits else "no, it does not fit: ", style="bold green" if plan.fits else "bold red")
    room = f"{size(plan.bytes)} of {size(plan.budget.bytes)} on {plan.budget.name} ({plan.budget.note})"
    console.print(verdict + Text(room, style="none"))
    for advice in plan.advice:
        console.print(Text(f"  try: {advice}"))


def as_text(plan: Plan) -> str:
    """The same as plain text, 110 columns."""
    out = io.StringIO()
    render(plan, Console(file=out, width=110, no_color=True, highlight=False))
    return out.getvalue()


def _bar(count: int, scale: int, style: str) -> Text:
    return Text("█" * max(1, round(BAR * count / scale)) if count else "", style=style)
