"""A plan for the eye: one line a part with a bar, the sum, and yes or no. Readable without colour."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.memory.lengths import UNKNOWN

if TYPE_CHECKING:
    from halfbyte.memory.plan import Plan

BAR, NAMED = 24, 40  # columns of a part's bar, and of its name and bytes at most
WIDE, BESIDE = 72, 20  # columns of the bar, and of what stands beside it
SHADES, COLOURS = "█▓▒░", ("cyan", "blue", "magenta", "yellow", "green")


def size(count: int) -> str:
    """`3.60 GiB`, `512.0 MiB`, `884.7 KiB`."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}" if unit == "GiB" else f"{count / factor:.1f} {unit}"
    return f"{count} B"


def render(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    # Where the terminal is narrow, bars are shorter and notes wrap; nothing is cut.
    bar = max(1, min(BAR, (console.width - NAMED) // 2))
    table.add_column("part", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    scale = max(plan.bytes, 1)
    for part in plan.parts:
        table.add_row(part.name, size(part.bytes), _bar(part.bytes, scale, bar, "cyan"), Text(part.note, style="dim"))
    table.add_row("in all", size(plan.bytes), _bar(plan.bytes, scale, bar, "green" if plan.fits else "red"), "", style="bold")
    p = plan.parameters
    share = f"{p.trained / (p.base + p.added):.2%}" if p.base else "0"
    console.print(Text(f"{plan.model}: {p.base:,} parameters, {p.packed:,} packed in {plan.format}, {p.trained:,} learn ({share})"))
    console.print(table)
    waits = "".join(
        f", {size(count)} of {what} in host memory"
        for count, what in ((plan.offloaded, "activations"), (plan.paged, "AdamW's moments"), (plan.embedded, "the embedding"))
        if count
    )
    rows = f"{plan.microbatch} x {plan.tokens} tokens, {plan.microbatches} a step{waits}, computed in {plan.compute}"
    console.print(Text(f"microbatch: {rows} ({plan.reason})"))
    verdict = Text("yes, it fits: " if plan.fits else "no, it does not fit: ", style="bold green" if plan.fits else "bold red")
    room = f"{size(plan.bytes)} of {size(plan.budget.bytes)} on {plan.budget.name} ({plan.budget.note})"
    console.print(verdict + Text(room, style="none"))
    console.print(_whole(plan, max(1, min(WIDE, console.width - BESIDE))))
    for line in _outlook(plan):
        console.print(Text(line))
    for advice in plan.advice:
        console.print(Text(f"  try: {advice}"))


def _whole(plan: Plan, wide: int) -> Text:
    """All parts behind each other in one bar as wide as the budget, and what stays free. wide: in characters."""
    scale, bar, used = max(plan.budget.bytes, plan.bytes, 1), Text("["), 0.0
    for i, part in enumerate(plan.parts):
        before, used = round(wide * used / scale), used + part.bytes
        bar.append(SHADES[i % len(SHADES)] * (round(wide * used / scale) - before), style=COLOURS[i % len(COLOURS)])
    bar.append("·" * (wide - round(wide * used / scale)), style="dim")
    free = max(plan.spare, 0)
    return bar.append(f"] {size(free)} free")


def _outlook(plan: Plan) -> list[str]:
    """The data's lengths, predicted speed, what less and more memory would choose, the longest row."""
    found = [f"data: {plan.lengths or UNKNOWN}"]
    if plan.tokens_per_second is not None and plan.seconds is not None:
        run = "" if plan.run_seconds is None else f", {_duration(plan.run_seconds)} in all"
        found.append(f"predicted: {plan.tokens_per_second:,.0f} tokens/s, {plan.seconds:.2f} s a step{run} ({plan.rates})")
    for one in plan.neighbours:
        sign = "less" if one.bytes < 0 else "more"
        speed = "" if one.gain is None else f"{one.gain:+.1%} speed at "
        found.append(f"with {size(abs(one.bytes))} {sign}: {speed}{size(one.need)} ({one.words})")
    if plan.longest:
        found.append(f"longest row that fits: {plan.longest:,} tokens")
    return found


def _duration(seconds: float) -> str:
    """`2 h 05 min`, `12 min`."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def as_text(plan: Plan) -> str:
    """The same as plain text, 110 columns."""
    out = io.StringIO()
    render(plan, Console(file=out, width=110, no_color=True, highlight=False))
    return out.getvalue()


def _bar(count: int, scale: int, wide: int, style: str) -> Text:
    return Text("█" * max(1, round(wide * count / scale)) if count else "", style=style)
