"""Rungs: the ways in which a run can use memory, from the one that is wanted most to the one that needs least.

Nothing of a rung changes what a step computes: rows at once, what backward computes again, what waits in host memory. So a plan is
the first rung that fits, and a run that finds less memory than was planned takes the next one and goes on with the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Asked = Literal["auto", "on", "off"]
CHUNKED = 8
"""How much smaller the chunks of the loss become on the last rungs."""


@dataclass(frozen=True)
class Rung:
    """microbatch: rows at once. recompute: of every layer. offload: what layers keep waits in host memory. paged: the
    optimizer's moments do. chunks: how many times smaller than usual the chunks of the loss are. bytes: planned, in all."""

    microbatch: int
    recompute: bool
    offload: bool = False
    paged: bool = False
    chunks: int = 1
    bytes: int = 0

    def words(self) -> str:
        """For people: `2 rows at once, every layer is recomputed in backward`."""
        found = [f"{self.microbatch} {'row' if self.microbatch == 1 else 'rows'} at once"]
        found.append("every layer is recomputed in backward" if self.recompute else "all activations are kept")
        if self.offload:
            found.append("what layers keep waits in host memory")
        if self.chunks > 1:
            found.append(f"the loss in chunks {self.chunks} times smaller")
        if self.paged:
            found.append("AdamW's moments are in host memory")
        return ", ".join(found)


def ways(
    rows: Sequence[int],
    recompute: Asked,
    offload: Callable[[int, bool], bool],
    paged: Sequence[bool],
    measure: Callable[[Rung], int],
) -> list[Rung]:
    """Every rung that may be taken, the most wanted first, with its bytes.

    rows: microbatches, the largest first. offload: whether (microbatch, recompute) does. paged: what may be, in that order.
    measure: the bytes of a rung. Keeping comes before recompute, more rows before fewer; paging and small chunks come last.
    """
    modes = {"on": [True], "off": [False], "auto": [False, True]}[recompute]
    found = [Rung(m, mode, offload(m, mode), paged[0]) for mode in modes for m in rows]
    if len(paged) > 1:
        found += [replace(rung, paged=True) for rung in found if rung.recompute == modes[-1]]
    found.append(replace(found[-1], chunks=CHUNKED))
    return [replace(rung, bytes=measure(rung)) for rung in found]


def below(rungs: Sequence[Rung], now: Rung) -> Rung | None:
    """The next rung behind `now`: the first that needs less."""
    place = next((i for i, rung in enumerate(rungs) if replace(rung, bytes=now.bytes) == now), -1)
    return next((rung for rung in rungs[place + 1 :] if rung.bytes < now.bytes), None)
