"""The memory of fused layers over one microbatch: every layer's share while others run, the loss between, and the largest moment.

Letters: T tokens of a microbatch, c bytes of a number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from halfbyte.layers.fused.host import UNDER_WAY
from halfbyte.layers.fused.keep import Keep, keeping
from halfbyte.memory import tape
from halfbyte.memory.tape import LIBRARY, SCRATCH, Passage, Work
from halfbyte.pinned import ALIGNED


@dataclass(frozen=True)
class Stage:
    """One layer with a `Keep`. here, away: bytes that it keeps on the device, and in host memory; host: those as pinned. scored: in
    fp8, its forward with products in 16 bits (`train.fusing.exact`), when no layer keeps anything."""

    keep: Keep
    here: int
    away: int
    host: int
    forward: Passage
    backward: Passage
    scored: Passage | None = None


def stage(w: Work, keep: Keep) -> Stage:
    """Of one layer."""
    sent = tape.away(w, keep)
    kept = sum(tape.kept(w, keep).values())
    host = sum(-(-size // ALIGNED) * ALIGNED for size in sent)
    scored = _scored(w, keep.tile) if w.layer.float8 else None
    return Stage(keep, kept - sum(sent), sum(sent), host, tape.forward(w, keep), tape.backward(w, keep), scored)


@functools.lru_cache(maxsize=64)
def _scored(w: Work, tile: int) -> Passage:
    """The same for whatever a layer would keep."""
    return tape.forward(replace(w, layer=w.layer.in_16_bits(), held=False), keeping((), tile=tile))


@dataclass(frozen=True)
class Ends:
    """What is outside the layers. hidden: bytes of one `[T, H]`. logits: of the loss's chunk and what belongs to it. tables: rotary
    tables and token numbers."""

    hidden: int
    logits: int
    tables: int

    @property
    def loss(self) -> int:
        """While the loss runs, or its gradient goes through the norm behind the layers: the norm's input and output, the gradient
        of the loss twice."""
        return 2 * self.hidden + max(self.logits + self.hidden, 2 * self.hidden)


@dataclass(frozen=True)
class Moment:
    """bytes, of which `kept` are waiting for backward, `scratch` is decoded weights and `library` attention's workspace."""

    name: str
    bytes: int
    kept: int
    scratch: int = 0
    library: int = 0


def moments(layers: Sequence[Stage], ends: Ends) -> Iterator[Moment]:
    """One for each layer's forward, the loss, each layer's backward."""
    held, flying = 0, [0] * UNDER_WAY
    # The model's own forward holds the embedding's output to its end, wherever the first layer sends it.
    embedded = ends.hidden if "x" in layers[0].keep.away else 0
    for i, one in enumerate(layers):
        yield _moment("forward", held + sum(flying) + (embedded if i > UNDER_WAY else 0), one.forward, ends.tables)
        held += one.here
        if one.away:
            flying = [*flying[1:], one.away]
    held += ends.tables
    yield Moment("loss", held + sum(flying) + ends.loss, held + ends.hidden)
    below = [one.away for one in layers]
    for i in range(len(layers) - 1, -1, -1):
        held -= layers[i].here
        ahead = next((size for size in reversed(below[:i]) if size), 0)
        yield _moment("backward", held + ahead, layers[i].backward)


def _moment(name: str, held: int, passage: Passage, more: int = 0) -> Moment:
    return Moment(name, held + passage.peak + more, held + more, passage.at_peak.get(SCRATCH, 0), passage.at_peak.get(LIBRARY, 0))


def gaps(layers: Iterable[Stage]) -> int:
    """Bytes that the allocator cannot hand out between tensors of gate and up on their way: measured at up to 0.6 GiB in all where
    470 MB a layer were sent, and at 0.3 where as much of smaller tensors was."""
    return max((one.away // 2 for one in layers if "inputs" in one.keep.away), default=0)


def peak(layers: Sequence[Stage], ends: Ends) -> Moment:
    """The largest, of a step or between two of them."""
    scored = max((one.scored for one in layers if one.scored is not None), key=lambda passage: passage.peak, default=None)
    between = [] if scored is None else [_moment("scored", ends.hidden, scored, ends.tables)]
    return max([*moments(layers, ends), *between], key=lambda m: m.bytes)
