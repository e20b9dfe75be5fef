"""`memory.png`: the parts of a step's memory on each other, as planned and as it was, in one picture.

Filled areas are parts, those that are there all the time below; the black line is what was measured over the same step, where it
was recorded, and level lines are the peaks of the whole run. Where the truth is known by part too, it has a panel of its own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import RecipeError
from halfbyte.memory.choose import Chooser
from halfbyte.memory.curve import DECODED, PASSING, PHASES, Curve, begins, planned
from halfbyte.memory.part import NOBODYS
from halfbyte.memory.plan import Plan
from halfbyte.memory.rungs import Rung
from halfbyte.memory.table import size as as_size
from halfbyte.memory.tape import LIBRARY, SCRATCH

GIB = 1 << 30
SUFFIXES = (".png", ".svg", ".pdf")
SMALL = 0.01
"""Of the peak: parts that never have more are drawn as one."""
REST, UPDATE = "small parts", "update"
COLOURS = {
    "context": "#6b6b6b",
    "packed weights": "#26547c",
    "weights": "#26547c",
    "other weights": "#5b8fb9",
    "other": "#b9b9b9",
    DECODED: "#94bfd9",
    "adapter": "#3a7d44",
    "gradients": "#7bb274",
    "optimizer": "#b6d7a8",
    "casts": "#8d99ae",
    "matrices": "#c9d6df",
    "heap": "#a59e8c",
    "answers": "#cfc6ae",
    "workspaces": "#d9d9d9",
    REST: "#e4e4e4",
    "activations": "#f2b134",
    "forward": "#e4813a",
    "loss": "#c8553d",
    "backward": "#a4343a",
    UPDATE: "#7d5ba6",
    SCRATCH: "#9a6fb0",
    LIBRARY: "#d291bc",
}


def draw(
    path: Path, heading: str, plan: Curve, real: Curve | None = None, levels: Mapping[str, int] | None = None, room: int = 0
) -> None:
    """Writes the picture. levels: measured bytes by name, drawn as level lines. room: of the budget, shown where it is near."""
    from matplotlib.figure import Figure

    split = real is not None and len(real.parts) > 1 and any(name in PASSING for name in real.parts)
    figure = Figure(figsize=(10, 8.4 if split else 5), layout="constrained")
    panels = figure.subplots(2 if split else 1, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    _areas(panels[0], plan, "planned: at most")
    if real is not None:
        _line(panels[0], real, "measured over one step", "black", "-")
    for (name, count), style in zip((levels or {}).items(), ("-", "--", ":"), strict=False):
        panels[0].axhline(count / GIB, color="black", linestyle=style, linewidth=0.8, alpha=0.6, label=f"{name}: {as_size(count)}")
    top = max([plan.peak, *(levels or {}).values(), real.peak if real else 0])
    if room and room < 1.6 * top:
        panels[0].axhline(room / GIB, color="tab:red", linewidth=1.2, label=f"may be used: {as_size(room)}")
        top = max(top, room)
    if split and real is not None:
        _areas(panels[1], real, "measured: at most")
        _line(panels[1], plan, "planned", "black", "--")
    for panel in panels:
        _axes(panel, 1.1 * top / GIB)
    panels[0].set_title(heading, fontsize=10)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def of_plan(path: Path, chooser: Chooser, plan: Plan) -> None:
    """The planned curve alone. Raises RecipeError (`memory.timeline`) for a file that is no picture."""
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"{path} is no picture", hint=f"one of {', '.join(SUFFIXES)}", code="memory.timeline")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, title(plan.model, chooser, plan.rung), planned(chooser, plan.rung), room=room(chooser, plan.rung))


def title(name: str, chooser: Chooser, rung: Rung) -> str:
    """Over the picture."""
    kept = textwrap.fill(rung.words(), 100)
    return f"{name}, {rung.microbatch} x {chooser.recipe.data.tokens} tokens: one microbatch and the update\n{kept}"


def room(chooser: Chooser, rung: Rung) -> int:
    """Bytes of the budget for what the curve counts."""
    outside = [p.bytes for p in chooser.parts(rung) if p.name in NOBODYS and chooser.budget.kind == "cuda"]
    return chooser.budget.bytes - sum(outside)


def merged(curve: Curve) -> dict[str, tuple[int, ...]]:
    """Parts from the bottom up: those that are there all the time, the small ones of them as one; then what comes and goes."""
    peak = max(curve.peak, 1)
    large = {n: s for n, s in curve.parts.items() if max(s) >= SMALL * peak or n in (*PASSING, UPDATE)}
    small = [s for n, s in curve.parts.items() if n not in large]
    rest = {REST: tuple(map(sum, zip(*small, strict=True)))} if small else {}
    steady = {n: s for n, s in large.items() if n not in (*PASSING, UPDATE)}
    return {**steady, **rest, **{n: large[n] for n in (*PASSING, UPDATE) if n in large}}


def _areas(panel: Any, curve: Curve, heading: str) -> None:
    bottom = [0.0] * len(curve.totals)
    handles = []
    for i, (name, sizes) in enumerate(merged(curve).items()):
        top = [below + size / GIB for below, size in zip(bottom, sizes, strict=True)]
        colour = COLOURS.get(name, f"C{i % 10}")
        label = f"{name}: {'up to ' if name in (*PASSING, UPDATE) else ''}{as_size(max(sizes))}"
        handles.append(
            panel.fill_between(curve.x, _closed(bottom), _closed(top), step="post", color=colour, linewidth=0, label=label)
        )
        bottom = top
    panel.set_ylabel("GiB")
    first = panel.legend(
        handles=handles[::-1], title=f"{heading} {as_size(curve.peak)}", loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8
    )
    first.get_title().set_fontsize(8)
    panel.add_artist(first)


def _line(panel: Any, curve: Curve, name: str, colour: str, style: str) -> None:
    totals = _closed([total / GIB for total in curve.totals])
    label = f"{name}: {as_size(curve.peak)}"
    panel.step(curve.x, totals, where="post", color=colour, linestyle=style, linewidth=1.2, label=label)


def _closed(values: Sequence[float]) -> list[float]:
    """The last value holds to the end of its interval."""
    return [*values, values[-1]]


def _axes(panel: Any, top: float) -> None:
    end = sum(PHASES.values())
    panel.set(xlim=(0, end), ylim=(0, top), xticks=[])
    for phase, width in PHASES.items():
        if begins(phase):
            panel.axvline(begins(phase), color="white", linewidth=0.8)
        panel.text(
            begins(phase) + width / 2, -0.02, phase, ha="center", va="top", fontsize=9, transform=panel.get_xaxis_transform()
        )
    lines = [line for line in panel.lines if not line.get_label().startswith("_")]
    if lines:
        panel.legend(handles=lines, loc="lower left", bbox_to_anchor=(1.01, 0), fontsize=8)
