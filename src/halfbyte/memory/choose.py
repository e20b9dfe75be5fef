"""The ways of a run to use memory: which there are for a recipe on a device, what each needs, and what is said about them.

Where layers run fused, `memory.search` finds all that no other beats in bytes and seconds; where they run as modules there are a
few (`rungs.ways`): all kept or all recomputed, by rows at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from halfbyte import machine
from halfbyte.config import Recipe
from halfbyte.errors import RecipeError
from halfbyte.kernels.dispatch import twin
from halfbyte.layers.fused.keep import NAMES
from halfbyte.memory import paging, search, timeline
from halfbyte.memory.budget import Budget, host_size
from halfbyte.memory.fused import Layer
from halfbyte.memory.lengths import Lengths
from halfbyte.memory.part import Part
from halfbyte.memory.parts import DTYPES, count, ends, fused_layer, learning, outside, weights
from halfbyte.memory.rungs import CHUNKED, LARGE, Rung, ways
from halfbyte.memory.shapes import Shapes
from halfbyte.memory.speed import Rates
from halfbyte.memory.tape import Work

ENOUGH_TOKENS = {"cuda": 16384, "cpu": 2048}
"""Tokens of a microbatch beyond which more rows gain nothing."""
HOST_SHARE = 0.5
"""Of the host memory that is free, what may be pinned for all that waits there: nobody else can have it meanwhile."""
ELSEWHERE = 24 << 30
"""The same of another machine, whose memory is not known."""
LADDER = 48
"""Rungs that a plan holds below the one that it chooses."""
STEP = 1024
"""Tokens: the longest row is told in multiples of it."""
ASKED = "asked for"


@dataclass(frozen=True)
class Chooser:
    """A recipe on a device. compute: by name. rates: of the device, as far as they are known. lengths: of the data, if known.
    context: bytes that this process has before the model, of a run on a CPU; 0 where the usual ones are counted."""

    s: Shapes
    recipe: Recipe
    budget: Budget
    compute: str
    rates: Rates
    lengths: Lengths | None = None
    context: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.compute]

    @cached_property
    def layer(self) -> Layer | None:
        """The layer as it runs fused, None where it runs as modules; of another machine it is assumed that Triton is there."""
        here = not self.budget.here or twin(torch.device("cuda")) == "fused"
        return fused_layer(self.s, self.compute) if self.budget.kind == "cuda" and here else None

    def parts(self, rung: Rung) -> list[Part]:
        """The bytes of a rung."""
        found = count(self.s, self.recipe, rung, self.dtype, self.budget.kind, self.layer)
        return [replace(p, bytes=self.context) if self.context and p.name == "context" else p for p in found]

    def bytes_of(self, rung: Rung) -> int:
        """All of them."""
        return sum(p.bytes for p in self.parts(rung))

    def rows(self) -> list[int]:
        """Microbatches that the recipe allows, the largest first."""
        batch, tokens = self.recipe.train.batch, self.recipe.data.tokens
        if isinstance(self.recipe.memory.microbatch, int):
            return [self.recipe.memory.microbatch]
        rows = [m for m in range(batch, 0, -1) if batch % m == 0]
        return [m for m in rows if m * tokens <= ENOUGH_TOKENS[self.budget.kind]] or [1]

    def rungs(self) -> list[Rung]:
        """Every way that is worth taking, the fastest first; each behind it needs fewer bytes."""
        if self.layer is None:
            paged, embedding = self.paging()[0], self.embedding()[0]
            never = lambda m, recompute: False  # noqa: E731
            return ways(self.rows(), self.recipe.memory.recompute, never, paged, embedding, self.bytes_of)
        w = Work(self.layer, 0, self.dtype.itemsize)
        found: list[Rung] = []
        for m in self.rows():
            task = self._task(m)
            found += search.rungs(task, replace(w, tokens=task.tokens), self.rates)
        found.append(self._leaner(min(found, key=lambda rung: rung.bytes)))
        return self._ladder(search.fastest(found))

    def _leaner(self, least: Rung) -> Rung:
        """The leanest there is: the search takes what is faster where it counts as many bytes, which are a bound."""
        found = [replace(rung, bytes=self.bytes_of(rung)) for rung in (least, *self._leanest())]
        best = min(found, key=lambda rung: rung.bytes)
        return replace(best, seconds=self.seconds(best))

    def _leanest(self) -> Iterator[Rung]:
        """As few rows at once as there may be, as little kept of each layer as the recipe allows, the loss in small chunks; and as
        many layers as host memory has room for send what they keep there."""
        task = self._task(self.rows()[-1])
        assert self.layer is not None
        w = Work(self.layer, task.tokens, self.dtype.itemsize)
        allowed = list(search.keeps(task))
        for tile in sorted({keep.tile for keep in allowed}):
            tiled = [keep for keep in allowed if keep.tile == tile]
            fewest = min(len(keep.kept()) for keep in tiled)
            lean = [keep for keep in tiled if len(keep.kept()) == fewest]
            here, sent = min(lean, key=lambda keep: len(keep.away)), max(lean, key=lambda keep: len(keep.away))
            size = timeline.stage(w, sent).host
            for paged, away in itertools.product(task.moments, task.embedding):
                room = size * task.layers if task.host is None else task.host - task.pinned[paged] - away * task.table
                if room < 0:
                    continue
                some = min(task.layers, room // size) if size else 0
                again = bool(tile) or not set(NAMES[1:]) <= set(here.kept())
                rung = Rung(task.microbatch, again, some > 0, paged, max(task.logits), embedding_away=away)
                yield replace(rung, lean=sent.spec() if some else here.spec(), lean_layers=some, rest=here.spec())

    def predicted(self, rung: Rung) -> float:
        """Seconds of a step as it will run: by CUDA graphs, where they may be used and there is room for what they hold."""
        graphs = self.recipe.train.graphs
        if self.layer is None or graphs == "off" or rung.offload or self.layer.dropout:
            return rung.seconds
        if graphs == "auto" and self.budget.bytes - rung.bytes < sum(p.bytes for p in self.parts(rung) if p.grows):
            return rung.seconds
        return min(rung.seconds, self.seconds(rung, graphs=True))

    def seconds(self, rung: Rung, graphs: bool = False) -> float:
        """Predicted for a step of fused layers; graphs: see `search.seconds`."""
        assert self.layer is not None
        task = self._task(rung.microbatch)
        w = Work(self.layer, task.tokens, self.dtype.itemsize, rung.decoded)
        keeps = rung.keeps(self.s.layers)
        return search.seconds(task, w, self.rates, keeps, rung.paged, rung.chunks, rung.embedding_away, graphs)

    def _ladder(self, rungs: list[Rung]) -> list[Rung]:
        """A few dozen: all near the budget, else every so many bytes."""
        gap = (rungs[0].bytes - rungs[-1].bytes) / LADDER
        near = next((rung for rung in rungs if rung.bytes <= self.budget.bytes), rungs[-1])
        kept: list[Rung] = []
        for rung in rungs:
            if not kept or rung in (near, rungs[-1]) or kept[-1].bytes - rung.bytes >= gap:
                kept.append(rung)
        return kept

    def _task(self, m: int, tokens: int = 0) -> search.Task:
        """tokens: of a row, the recipe's unless given."""
        s, recipe = self.s, self.recipe
        row = tokens or recipe.data.tokens
        assert self.layer is not None
        marks = {n: ends(s, m * row, self.layer.head_size, self.dtype, n) for n in (LARGE, 1.0, CHUNKED)}
        if marks[LARGE] == marks[1.0]:  # one chunk is all there is
            del marks[LARGE]
        fixed = [
            *weights(s, recipe, embedding_away=True),
            *(p for p in learning(s, recipe) if p.name != "optimizer"),
            *outside("cuda"),
        ]
        bits = recipe.optim.bits
        return search.Task(
            layers=s.layers,
            tokens=m * row,
            microbatches=recipe.train.batch // m,
            microbatch=m,
            document=row if self.lengths is None else min(row, self.lengths.document),
            hidden=s.hidden,
            vocabulary=s.vocab,
            recompute=recipe.memory.recompute,
            offload=recipe.memory.offload,
            host=self.host(),
            pinned={paged: paging.size(s.padded, bits) if paged else 0 for paged in self.paging()[0]},
            table=s.embedding,
            room=self.budget.bytes,
            fixed=sum(p.bytes for p in fixed) + s.layers * self.layer.beside(self.dtype.itemsize),
            moments={paged: paging.moments(s.padded, bits, paged).bytes for paged in self.paging()[0]},
            decoded=self.decoded(),
            embedding={away: 0 if away else s.embedding for away in self.embedding()[0]},
            logits={n: end.logits for n, end in marks.items()},
            tables=marks[1.0].tables,
            numbers=s.padded,
            bits=bits,
        )

    def decoded(self) -> dict[bool, int]:
        """Bytes of decoded weights, by whether they are held: what may be."""
        assert self.layer is not None
        size = self.s.layers * self.layer.decoded(self.dtype.itemsize)
        return {False: 0, True: size} if size and self.s.report.packed else {False: 0}

    def decoded_reason(self, rung: Rung) -> str:
        """Whether fused layers hold decoded weights, and why."""
        if self.layer is None:
            return "auto: on a GPU only fused layers hold them"
        size = self.decoded().get(True, 0)
        if not size:
            return "auto: there is nothing to decode"
        why = "no product decodes" if rung.decoded else "the fastest plan that fits does without"
        return f"auto: they take {gib(size)}; {why}"

    def host(self) -> int | None:
        """Bytes of host memory that may be pinned for all that waits there; None where the recipe insists on offloading."""
        return None if self.recipe.memory.offload == "on" else self._pinned()[0]

    def _pinned(self) -> tuple[int, str]:
        """The same as what may be, whatever is asked; and why so much, for people."""
        if self.recipe.memory.host != "auto":
            return host_size(self.recipe.memory.host), f"memory.host is {self.recipe.memory.host}"
        if not self.budget.here:
            return ELSEWHERE, f"{gib(ELSEWHERE)} are assumed"
        free = machine.ram().free
        return int(HOST_SHARE * free), f"{gib(free)} are free, and no more than {HOST_SHARE:.0%} of that is pinned"

    def paging(self) -> tuple[list[bool], str]:
        """Whether the optimizer's moments may be in host memory, in the order of what is wanted; and the reason why not, or ""."""
        if self.budget.kind == "cpu":
            return [False], "this device's memory is the host's"
        if self.recipe.optim.paged != "auto":
            return [self.recipe.optim.paged == "always"], ASKED
        wanted, (room, why) = paging.size(self.s.padded, self.recipe.optim.bits), self._pinned()
        if wanted > room:
            return [False], f"auto: they would take {gib(wanted)} of host memory; {why}"
        return [False, True], ""

    def embedding(self) -> tuple[list[bool], str]:
        """Whether the input embedding may be in host memory, in the order of what is wanted; and the reason why not, or "".

        Raises RecipeError (`memory.embedding`) where that is asked for and cannot be."""
        asked, (room, why) = self.recipe.memory.embedding, self._pinned()
        if self.budget.kind == "cpu":
            return [False], "this device's memory is the host's"
        if asked == "host" and self.s.embedding_stays:
            message = f"memory.embedding: host cannot be had here: {self.s.embedding_stays}"
            raise RecipeError(message, hint="set `memory.embedding: auto`", code="memory.embedding")
        if asked != "auto":
            return [asked == "host"], ASKED
        if self.s.embedding_stays:
            return [False], f"auto: {self.s.embedding_stays}"
        if self.s.embedding > room:
            return [False], f"auto: it would take {gib(self.s.embedding)} of host memory; {why}"
        return [False, True], ""

    def embedding_reason(self, rung: Rung) -> str:
        """Where the input embedding is, and why."""
        told = self.embedding()[1]
        return told or (
            "auto: faster than what else would fit" if rung.embedding_away else "auto: it stays while memory is not short"
        )

    def longest(self) -> int | None:
        """Tokens of the longest row that trains, in multiples of STEP; None where layers run as modules."""
        if self.layer is None:
            return None
        low, high = 0, 1 << 12
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self._trains(middle * STEP) else (low, middle)
        return low * STEP

    def _trains(self, tokens: int) -> bool:
        data = self.recipe.data.model_copy(update={"tokens": tokens})
        other = replace(self, recipe=self.recipe.model_copy(update={"data": data}))
        return any(other.bytes_of(rung) <= self.budget.bytes for rung in other._leanest())

    def reason(self, rungs: list[Rung], rung: Rung, fits: bool) -> str:
        """Why this one."""
        if not fits:
            return "nothing smaller is left to choose"
        why = "as asked" if len(rungs) == 1 else "the fastest" if rung == rungs[0] else "the fastest that fits"
        return f"{rung.words()}: {why}"

    def paging_reason(self, rung: Rung) -> str:
        """Where the moments are, and why."""
        told = self.paging()[1]
        return told or ("auto: faster than what else would fit" if rung.paged else "auto: they stay while memory is not short")

    def offload_reason(self, rung: Rung, size: int) -> str:
        """Whether something waits in host memory, and why. size: of that."""
        if self.layer is None:
            return "auto: only fused layers can"
        if self.recipe.memory.offload != "auto":
            return ASKED
        if not size:
            return "auto: nothing is gained by it"
        return f"auto: it takes {gib(size)} of host memory; {self._pinned()[1]}"


def gib(count: int) -> str:
    """`3.60 GiB` or `512 MiB`."""
    return f"{count / (1 << 30):.2f} GiB" if abs(count) >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
