"""Rungs: the ways in which a run can use memory, from the one that is wanted most to the one that needs least.

Nothing of a rung changes what a step computes: rows at once, what backward computes again, what waits in host memory. So a plan is
the first rung that fits, and a run that finds less memory than was planned takes the next one and goes on with the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, NAMES, OFFLOADED, Keep

Asked = Literal["auto", "on", "off"]
CHUNKED = 8
"""How much smaller the chunks of the loss become on the last rungs."""
LARGE = 1 / 8
"""And where memory is plenty, so that the output head is read that much less often."""


@dataclass(frozen=True)
class Rung:
    """microbatch: rows at once. recompute: of anything in any layer. offload: something that layers keep waits in host memory.
    paged: the optimizer's moments do. chunks: how many times smaller than usual the chunks of the loss are (`LARGE`: larger).
    bytes: planned, in all. lean, rest: what `lean_layers` fused layers keep, and what the others do (`Keep.spec`); "" where
    recompute and offload say all: every layer then keeps everything or its input. seconds: predicted for a step, 0 where it is not.
    decoded: fused layers hold their weights decoded too. embedding_away: the input embedding is in host memory."""

    microbatch: int
    recompute: bool
    offload: bool = False
    paged: bool = False
    chunks: float = 1
    bytes: int = 0
    lean: str = ""
    lean_layers: int = 0
    rest: str = ""
    seconds: float = 0.0
    decoded: bool = False
    embedding_away: bool = False

    def keeps(self, layers: int) -> list[Keep]:
        """What each of so many fused layers keeps.

        Lean layers come first: backward reaches them last, when the memory of the others is free again. Where the two do not send
        the same over the bus they are spread among each other instead, so that its work is even.
        """
        if not self.rest:
            return [keep_of(self.recompute, self.offload)] * layers
        lean, rest = Keep.from_spec(self.lean), Keep.from_spec(self.rest)
        return [lean if is_lean else rest for is_lean in places(layers, self.lean_layers, lean, rest)]

    def words(self) -> str:
        """For people: `2 rows at once, every layer is recomputed in backward`."""
        found = [f"{self.microbatch} {'row' if self.microbatch == 1 else 'rows'} at once"]
        found.append(self.kept())
        if self.chunks != 1:
            times = f"{self.chunks:g} times smaller" if self.chunks > 1 else f"{1 / self.chunks:g} times larger"
            found.append(f"the loss in chunks {times}")
        if self.paged:
            found.append("AdamW's moments are in host memory")
        if self.embedding_away:
            found.append("the embedding is in host memory")
        if self.decoded:
            found.append("decoded weights are held")
        return ", ".join(found)

    def kept(self) -> str:
        """What layers keep, and where, for people."""
        if not self.rest:
            told = "every layer is recomputed in backward" if self.recompute else "all activations are kept"
            return told + (", what layers keep waits in host memory" if self.offload else "")
        lean, rest = (_told(spec) for spec in (self.lean, self.rest))
        if not self.lean_layers or self.lean == self.rest:
            return "all activations are kept" if rest == "everything" else f"layers keep {rest}"
        return f"{self.lean_layers} layers keep {lean}, the others {rest}"


def _told(spec: str) -> str:
    return {EVERYTHING.spec(): "everything", INPUTS.spec(): "their inputs"}.get(spec, spec)


def keep_of(recompute: bool, offload: bool) -> Keep:
    """What every fused layer keeps where no more is said."""
    if offload:
        return OFFLOADED if recompute else replace(EVERYTHING, away=("x", *NAMES))
    return INPUTS if recompute else EVERYTHING


def places(layers: int, count: int, lean: Keep, rest: Keep) -> list[bool]:
    """Which layers are lean, `count` of them: the first, or every so many. Of those that are spread the last one sends less than
    others: backward begins with it, and waits for what it has away."""
    if lean.away == rest.away:
        return [i < count for i in range(layers)]
    spread = [(i + 1) * count // layers > i * count // layers for i in range(layers)]
    return spread if lean.sent() < rest.sent() else spread[::-1]


def ways(
    rows: Sequence[int],
    recompute: Asked,
    offload: Callable[[int, bool], bool],
    paged: Sequence[bool],
    embedding: Sequence[bool],
    measure: Callable[[Rung], int],
) -> list[Rung]:
    """Every rung that may be taken, the most wanted first, with its bytes.

    rows: microbatches, the largest first. offload: whether (microbatch, recompute) does. paged, embedding: what may be, in that
    order. measure: the bytes of a rung. Keeping comes before recompute, more rows before fewer; an embedding in host memory, paging
    and small chunks come last.
    """
    modes = {"on": [True], "off": [False], "auto": [False, True]}[recompute]
    found = [Rung(m, mode, offload(m, mode), paged[0], embedding_away=embedding[0]) for mode in modes for m in rows]
    if len(embedding) > 1:
        found += [replace(rung, embedding_away=True) for rung in found if rung.recompute == modes[-1]]
    if len(paged) > 1:
        found += [
            replace(rung, paged=True) for rung in found if rung.recompute == modes[-1] and rung.embedding_away == embedding[-1]
        ]
    found.append(replace(found[-1], chunks=CHUNKED))
    return [replace(rung, bytes=measure(rung)) for rung in found]


def below(rungs: Sequence[Rung], now: Rung) -> Rung | None:
    """The next rung behind `now`: the first that needs less."""
    place = next((i for i, rung in enumerate(rungs) if replace(rung, bytes=now.bytes) == now), -1)
    return next((rung for rung in rungs[place + 1 :] if rung.bytes < now.bytes), None)
