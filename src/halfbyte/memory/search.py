"""Every way in which fused layers can use memory that no other way beats in both bytes and seconds.

A way is: rows at once, what the lean layers keep, how many they are, what the others keep, the chunks of the loss, where AdamW's
moments are, where the input embedding is. Layers are alike, so which of them are lean is settled by rule (`rungs.places`) and
their number can be enumerated: for two choices A and B and every k the bytes are sums of a few numbers a choice, made for all pairs
at once in arrays; the seconds are those of the products, recomputed ones included, of the bus, or of the host that
launches them, whichever takes longest, in forward and in backward.
Cost: about half a second for an 8B model; what is on the front is counted and timed again layer by layer (`memory.timeline`,
`memory.bus`).

Letters: A, B of the lean layers and the others, k of L layers are lean.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, NAMES, Keep, keeping
from halfbyte.memory import bus, speed, tape, timeline
from halfbyte.memory.rungs import Asked, Rung, places
from halfbyte.memory.speed import Rates
from halfbyte.memory.tape import Work
from halfbyte.memory.timeline import Ends, Stage

Floats = NDArray[np.float64]
TILES = (16384, 4096)
"""Tokens of an MLP's tile, where a row is at least four times as long."""
STEPS = 24
"""Rungs that are kept of those that no other beats, and as many around the budget in steps of NEAR bytes."""
NEAR = 1 << 28
BINS = 1024
BESIDE = 0.05
"""Of the time of a copy over the bus, what it takes from the layers that run beside it, however well it is hidden."""


@dataclass(frozen=True)
class Task:
    """layers: how many. tokens: of a microbatch; document: of a usual one. recompute, offload: what the recipe asks for. host:
    bytes of host memory that may be pinned, None for any; pinned: of that, AdamW's moments, by whether they are paged; table: the
    input embedding. room: bytes of the budget. fixed: bytes that are always there;
    moments: bytes of AdamW's on the device, by whether they are paged. decoded: bytes of decoded weights, by whether they are held.
    embedding: bytes of the input embedding on the device, by whether it is in host memory. logits: bytes of the loss's chunk, by
    how many times smaller it is than usual. tables: see `timeline.Ends`. numbers, bits: of the optimizer."""

    layers: int
    tokens: int
    microbatches: int
    microbatch: int
    document: float
    hidden: int
    vocabulary: int
    recompute: Asked
    offload: Asked
    host: int | None
    pinned: dict[bool, int]
    table: int
    room: int
    fixed: int
    moments: dict[bool, int]
    decoded: dict[bool, int]
    embedding: dict[bool, int]
    logits: dict[float, int]
    tables: int
    numbers: int
    bits: int


def keeps(task: Task) -> Iterator[Keep]:
    """Every choice for one layer that the recipe allows. Inputs of the norms are cheap to compute again and never cross the bus."""
    places = {"auto": "kor", "on": "kor", "off": "ko"}[task.recompute]
    if task.offload == "off":
        places = places.replace("o", "")
    for x, normed, *rest in itertools.product("ko", "kr", *[places] * 4):
        by_name = {"normed": normed, **dict(zip(NAMES[1:], rest, strict=True))}
        away = [name for name, place in (("x", x), *by_name.items()) if place == "o"]
        kept = [name for name, place in by_name.items() if place != "r"]
        if (task.offload == "off" and away) or (task.offload == "on" and x != "o"):
            continue
        if (task.recompute == "on" and "inputs" in kept) or (task.recompute == "off" and normed == "r" and "o" not in rest):
            continue
        if normed == "k" and not {"qkv", "mid", "inputs"} <= set(kept):
            continue
        yield keeping(kept, away)
        if "inputs" not in kept and normed == "r":
            yield from (keeping(kept, away, tile) for tile in TILES if task.tokens >= 4 * tile)


@dataclass(frozen=True)
class Option:
    """A stage with its seconds: of what is computed again; of the host to launch it, forward and backward."""

    stage: Stage
    again: float
    host: tuple[float, float]


def options(task: Task, w: Work, rates: Rates) -> list[Option]:
    """The choices for one layer, less those that another one beats in everything."""
    cost = _cost(task, w, rates)
    found = []
    for keep in keeps(task):
        host = speed.host_seconds(w.layer, keep, task.tokens, rates)
        found.append(Option(timeline.stage(w, keep), cost.recompute(keep), host))
    numbers = np.array([[o.stage.here, o.stage.away, o.again, o.stage.forward.peak, o.stage.backward.peak, *o.host] for o in found])
    # Worse by a thousandth is no reason to stay in the list.
    worse = numbers[:, None, :] * 0.999 - 1e-9 <= numbers[None, :, :]
    beaten = (worse.all(2) & (numbers[:, None, :].sum(2) < numbers[None, :, :].sum(2) * 1.001)).T
    order = np.argsort(numbers[:, 2], kind="stable")
    kept: list[int] = []
    for i in order:
        if not any(beaten[i, j] for j in kept):
            kept.append(int(i))
    must = [i for i, o in enumerate(found) if o.stage.keep in (EVERYTHING, INPUTS)]
    return [found[i] for i in sorted({*kept, *must})]


def seconds(
    task: Task,
    w: Work,
    rates: Rates,
    keeps: Sequence[Keep],
    paged: bool,
    chunks: float,
    embedding_away: bool = False,
    graphs: bool = False,
) -> float:
    """Predicted for a step with what each layer keeps. graphs: layers run as CUDA graphs, which the host launches at once."""
    return _step(task, w, rates, _microbatch(task, w, rates, keeps, chunks, graphs), paged, embedding_away)


def _step(task: Task, w: Work, rates: Rates, microbatch: float, paged: bool, embedding_away: bool) -> float:
    """The same from the seconds of layers and loss in one microbatch."""
    table = speed.embedding_cost(task.tokens, task.hidden, w.c, rates) if embedding_away else 0.0
    return task.microbatches * (microbatch + table) + speed.optimizer_cost(task.numbers, task.bits, paged, rates)


def _microbatch(task: Task, w: Work, rates: Rates, keeps: Sequence[Keep], chunks: float, graphs: bool = False) -> float:
    """Of layers and loss."""
    cost = _cost(task, w, rates)
    times: dict[int, tuple[float, float, float]] = {}  # by identity, since a rung has two of them, many times
    for keep in {id(keep): keep for keep in keeps}.values():
        copy, host = sum(tape.away(w, keep)) / rates.bus, sum(speed.host_seconds(w.layer, keep, task.tokens, rates))
        times[id(keep)] = cost.backward + cost.recompute(keep), copy, host
    backward, copies, launches = ([times[id(keep)][i] for keep in keeps] for i in range(3))
    loss = speed.ends_cost(task.tokens, task.hidden, task.vocabulary, w.c, rates, chunks)
    whole = bus.seconds(cost.forward, backward, copies, loss)
    return max(whole, 0.0 if graphs else sum(launches) + loss) + 2 * BESIDE * sum(copies)


def _cost(task: Task, w: Work, rates: Rates) -> speed.Cost:
    """Of one layer."""
    return speed.layer_cost(w.layer, task.tokens, task.document, w.c, rates, w.held)


def rungs(task: Task, w: Work, rates: Rates) -> list[Rung]:
    """Those of one number of rows at once that no other one of them beats, exactly counted; fastest first."""
    found: list[Rung] = []
    for decoded in (held for held, size in task.decoded.items() if not held or task.fixed + size < task.room):
        found += _with(task, replace(w, held=decoded), rates)
    return fastest(found)


def _with(task: Task, w: Work, rates: Rates) -> Iterator[Rung]:
    """The same with decoded weights held, or not."""
    choices = options(task, w, rates)
    cost = _cost(task, w, rates)
    for chunks in task.logits:
        ends = Ends(task.tokens * task.hidden * w.c, task.logits[chunks], task.tables)
        bytes_, times, waits = _pairs(task, choices, cost, ends, rates)
        known: dict[int, tuple[Rung, float]] = {}
        for paged, away in itertools.product(task.moments, task.embedding):
            # All that is pinned shares one limit.
            left = np.inf if task.host is None else task.host - task.pinned[paged] - away * task.table
            if left < 0 and ((paged and False in task.moments) or (away and False in task.embedding)):
                continue
            index = np.flatnonzero(waits <= max(left, 0))
            always = task.fixed + task.moments[paged] + task.decoded[w.held] + task.embedding[away]
            for at in index[_front(bytes_[index], times[index], task.room - always)]:
                if at not in known:
                    a, b, k = np.unravel_index(at, (len(choices), len(choices), task.layers + 1))
                    known[at] = _rung(task, w, rates, (choices[a].stage, choices[b].stage, int(k)), chunks, ends)
                rung, took = known[at]
                took = _step(task, w, rates, took, paged, away)
                yield replace(rung, bytes=always + rung.bytes, seconds=took, paged=paged, embedding_away=away)


def _rung(task: Task, w: Work, rates: Rates, mix: tuple[Stage, Stage, int], chunks: float, ends: Ends) -> tuple[Rung, float]:
    """k layers like A and the others like B, with the bytes of layers and ends, and their seconds in one microbatch."""
    a, rest, k = mix
    lean = a if k else rest
    stages = [lean if is_lean else rest for is_lean in places(task.layers, k, lean.keep, rest.keep)]
    rung = Rung(
        task.microbatch,
        recompute=any(s.keep.tile or not all(getattr(s.keep, n) for n in NAMES[1:]) for s in (lean, rest)),
        offload=bool(lean.keep.away or rest.keep.away),
        chunks=chunks,
        bytes=timeline.peak(stages, ends).bytes + timeline.gaps((lean, rest)),
        lean=lean.keep.spec(),
        lean_layers=k,
        rest=rest.keep.spec(),
        decoded=w.held,
    )
    return rung, _microbatch(task, w, rates, [s.keep for s in stages], chunks)


def _pairs(task: Task, choices: Sequence[Option], cost: speed.Cost, ends: Ends, rates: Rates) -> tuple[Floats, Floats, Floats]:
    """Bytes of layers and ends, seconds of the layers in one microbatch, and bytes of host memory, each flat over [A, B, k]."""
    stages = [o.stage for o in choices]
    here, away, host, forward, backward, again, ahead, behind = (
        np.array(values, dtype=np.float64)
        for values in (
            [s.here for s in stages],
            [s.away for s in stages],
            [s.host for s in stages],
            [s.forward.peak for s in stages],
            [s.backward.peak for s in stages],
            [o.again for o in choices],
            *zip(*(o.host for o in choices), strict=True),
        )
    )
    k = np.arange(task.layers + 1, dtype=np.float64)
    rest = task.layers - k

    def a(x: Floats) -> Floats:
        return x[:, None, None]

    def b(x: Floats) -> Floats:
        return x[None, :, None]

    held = k * a(here) + rest * b(here)
    some, others = k > 0, rest > 0
    flying = 2 * np.maximum(np.where(some, a(away), 0), np.where(others, b(away), 0))
    where = [s.keep.away for s in stages]
    which = np.array([where.index(one) for one in where])
    spread = a(which) != b(which)
    tall_a = np.where(spread, held, k * a(here)) - a(here) + np.maximum(a(forward), a(backward))
    tall_b = held - b(here) + np.maximum(b(forward), b(backward))
    layers = np.maximum(np.where(some, tall_a, 0), np.where(others, tall_b, 0)) + flying
    top = np.maximum(layers + ends.hidden + ends.tables, held + flying + ends.loss + ends.tables)
    scored = np.array([0 if s.scored is None else s.scored.peak for s in stages], dtype=np.float64)
    top = np.maximum(top, np.maximum(a(scored), b(scored)) + ends.hidden + ends.tables)
    apart = np.array([timeline.gaps((s,)) for s in stages], dtype=np.float64)
    top = top + np.maximum(np.where(some, a(apart), 0), np.where(others, b(apart), 0))
    sent = (k * a(away) + rest * b(away)) / rates.bus
    last = np.where(some, np.where(others, np.minimum(a(away), b(away)), a(away)), b(away)) / rates.bus
    launched = np.maximum(sent, k * a(ahead) + rest * b(ahead)), np.maximum(sent, k * a(behind) + rest * b(behind))
    plain = task.layers * cost.forward
    back = task.layers * cost.backward + k * a(again) + rest * b(again)
    seconds = np.maximum(plain, launched[0]) + np.maximum(back, launched[1]) + 2 * BESIDE * sent + last
    waits = k * a(host) + rest * b(host)
    return top.reshape(-1), seconds.reshape(-1), waits.reshape(-1)


def _front(bytes_: Floats, seconds: Floats, room: float) -> list[int]:
    """Places of those that need fewer bytes than everything at least as fast; about STEPS of them, evenly in bytes, and those near
    `room`."""
    # Most are slower than something that needs no more: found by bins of bytes, so that few are sorted.
    least, width = float(bytes_.min()), max(float(bytes_.max() - bytes_.min()) / BINS, 1.0)
    bins = ((bytes_ - least) / width).astype(np.int64)
    best = np.full(BINS + 1, np.inf)
    np.minimum.at(best, bins, seconds)
    places = np.flatnonzero(seconds <= np.minimum.accumulate(best)[bins])
    order = places[np.lexsort((bytes_[places], seconds[places]))]
    below = np.minimum.accumulate(bytes_[order])
    better = order[np.concatenate([[True], below[1:] < below[:-1]])]
    if len(better) <= STEPS:
        return [int(i) for i in better]
    least = float(bytes_[better[-1]])
    marks = [*np.linspace(bytes_[better[0]], least, STEPS), *(room + (i * NEAR) for i in range(-8, 9))]
    # The fastest at or below each mark.
    found = {int(np.flatnonzero(bytes_[better] <= max(mark, least))[0]) for mark in marks}
    return [int(better[i]) for i in sorted(found)]


def fastest(found: Sequence[Rung]) -> list[Rung]:
    """The rungs that no other beats in both, fastest first: each needs fewer bytes than those before it."""
    kept: list[Rung] = []
    for rung in sorted(found, key=lambda r: (r.seconds, r.bytes)):
        if not kept or rung.bytes < kept[-1].bytes:
            kept.append(rung)
    return kept
