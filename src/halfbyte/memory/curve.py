"""What is in memory over one microbatch and the update behind it, part by part: as planned, or as it was (`memory.trace`).

Why by phase and not by time: the host runs ahead of a GPU, and what is allocated follows the host's order. Each phase has a fixed
width on the axis, so a planned curve and a real one lie on each other. On a GPU the curve is what the allocator gives out; CUDA's
context is not in it. On a CPU it is the process, Python included.
Cost: some milliseconds, and what the shapes cost (a second).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from halfbyte.memory import timeline
from halfbyte.memory.choose import Chooser
from halfbyte.memory.part import NOBODYS, Part
from halfbyte.memory.parts import ends
from halfbyte.memory.rungs import Rung
from halfbyte.memory.tape import LIBRARY, SCRATCH, Work

PHASES = {"forward": 1.0, "loss": 0.25, "backward": 1.4, "update": 0.25}
"""In their order, with their widths."""
DECODED = "decoded weights"
PASSING = ("activations", "forward", "loss", "backward", "scored", SCRATCH, LIBRARY)
"""Parts that come and go in a step, or between two; the others are there all the time."""


@dataclass(frozen=True)
class Curve:
    """x: n + 1 places between which nothing changes. parts: n bytes each, by name, those first that are there all the time."""

    x: tuple[float, ...]
    parts: Mapping[str, tuple[int, ...]]

    @property
    def totals(self) -> tuple[int, ...]:
        """Bytes of all parts, n of them."""
        return tuple(map(sum, zip(*self.parts.values(), strict=True)))

    @property
    def peak(self) -> int:
        """The most bytes that there are."""
        return max(self.totals)

    def at_peak(self) -> dict[str, int]:
        """Bytes by part at the largest moment."""
        totals = self.totals
        at = totals.index(max(totals))
        return {name: sizes[at] for name, sizes in self.parts.items()}


def begins(phase: str) -> float:
    """Where a phase begins on the axis."""
    return sum(width for name, width in PHASES.items() if list(PHASES).index(name) < list(PHASES).index(phase))


def made(moments: Sequence[tuple[float, Mapping[str, int]]], always: Mapping[str, int]) -> Curve:
    """From the places where something changes, in order, with what then comes and goes; `always` is there besides."""
    x = (*(place for place, _ in moments), sum(PHASES.values()))
    names = [*always, *dict.fromkeys(name for _, sizes in moments for name in sizes if name not in always)]
    rows = [{**always, **sizes} for _, sizes in moments]
    found = {name: tuple(row.get(name, 0) for row in rows) for name in names}
    return Curve(x, {name: sizes for name, sizes in found.items() if any(sizes)})


def planned(chooser: Chooser, rung: Rung, decoded: int = 0) -> Curve:
    """Of a rung. decoded: bytes of decoded weights that modules hold on a CPU, where no rung says so."""
    parts = chooser.parts(rung)
    hidden = set(NOBODYS) if chooser.budget.kind == "cuda" else set()
    # Held weights answer the fixed prompts too.
    hidden |= {"answers"} if decoded else set()
    always = {p.name: p.bytes for p in parts if p.name not in (*PASSING, *hidden)}
    if decoded:
        always[DECODED] = decoded
    found = _fused(chooser, rung) if chooser.layer is not None else _modules(chooser.s.layers, parts)
    return made([*found, (begins("update"), {})], always)


def _fused(chooser: Chooser, rung: Rung) -> Iterator[tuple[float, dict[str, int]]]:
    """Each layer's largest moment, and the loss."""
    layer, tokens = chooser.layer, rung.microbatch * chooser.recipe.data.tokens
    assert layer is not None
    w = Work(layer, tokens, chooser.dtype.itemsize, rung.decoded)
    keeps = rung.keeps(chooser.s.layers)
    stages = {keep: timeline.stage(w, keep) for keep in set(keeps)}
    outside = ends(chooser.s, tokens, layer.head_size, chooser.dtype, rung.chunks)
    passed = dict.fromkeys(PHASES, 0)
    for m in timeline.moments([stages[keep] for keep in keeps], outside):
        share = passed[m.name] / (1 if m.name == "loss" else len(keeps))
        passed[m.name] += 1
        rest = m.bytes - m.kept - m.scratch - m.library
        yield (
            begins(m.name) + PHASES[m.name] * share,
            {"activations": m.kept, m.name: rest, SCRATCH: m.scratch, LIBRARY: m.library},
        )


def _modules(layers: int, parts: Sequence[Part]) -> Iterator[tuple[float, dict[str, int]]]:
    """Straight lines: activations grow layer by layer and go again, the rest is there in its phase."""
    size = {p.name: p.bytes for p in parts}
    scratch = {SCRATCH: size.get(SCRATCH, 0)}
    for i in range(layers):
        yield begins("forward") + i / layers, {"activations": size["activations"] * (i + 1) // layers, **scratch}
    yield begins("loss"), {"activations": size["activations"], "loss": size.get("loss", 0), **scratch}
    for i in range(layers):
        kept = size["activations"] * (layers - i) // layers
        place = begins("backward") + PHASES["backward"] * i / layers
        yield place, {"activations": kept, "backward": size.get("backward", 0), **scratch}
