"""For `fits_gpu.py`: plans to hold the chosen one against, and the table by card."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.layers.fused.keep import keeping
from halfbyte.memory.choose import Chooser
from halfbyte.memory.rungs import Rung

Line = dict[str, Any]
COMBINATIONS = (
    *(
        "normed qkv attended mid inputs",
        "qkv attended mid inputs",
        "qkv attended mid",
        "attended mid",
        "attended",
        "qkv",
        "nothing",
    ),
    *("x>", "x> attended>", "x> qkv> attended> mid>", "x> qkv> attended> mid> inputs>", "qkv attended mid inputs>", "inputs>"),
)
"""What a layer may keep, in words of `Keep.spec`; `>`: in host memory."""


TRIED = 1500
"""Of all their mixtures, how many are counted."""


def fitting(chooser: Chooser) -> Iterator[Rung]:
    """Plans of all sorts that fit, with predicted bytes and seconds: TRIED by lot of the pairs of COMBINATIONS over shares of the
    layers, by rows at once, with and without the rest of what a plan may choose."""
    layers = chooser.s.layers
    shares = [layers // 4, layers // 2, 3 * layers // 4, layers]
    specs = [_spec(words) for words in COMBINATIONS]
    some = itertools.product(chooser.rows(), chooser.paging()[0], chooser.embedding()[0], chooser.decoded(), specs, specs, shares)
    every = [one for one in some if (one[-1] == layers) == (one[-2] == one[-3])]
    for rows, paged, away, held, lean, rest, k in random.Random(1).sample(every, min(TRIED, len(every))):
        bare = Rung(rows, True, True, paged, 1, 0, lean, k, rest, 0.0, held, away)
        size = sum(p.bytes for p in chooser.parts(bare))
        if size <= chooser.budget.bytes:
            yield replace(bare, bytes=size, seconds=chooser.seconds(bare))


def _spec(words: str) -> str:
    """As `Keep.spec` writes it."""
    names = [] if words == "nothing" else words.split()
    return keeping([n.rstrip(">") for n in names if n != "x>"], [n.rstrip(">") for n in names if n.endswith(">")]).spec()


def others(chooser: Chooser, chosen: Rung, count: int) -> list[Rung]:
    """At most `count` besides the chosen one: the best of each kind (rows, moments, embedding, decoded weights), those predicted to
    be the fastest, and some by lot."""
    found = sorted(fitting(chooser), key=lambda rung: rung.seconds)
    found = [r for r in found if r.words() != chosen.words()]
    best: dict[tuple[object, ...], Rung] = {}
    for rung in found:
        best.setdefault((rung.microbatch, rung.paged, rung.embedding_away, rung.decoded), rung)
    lot = random.Random(0).sample(found, min(len(found), count // 4))
    picked: dict[str, Rung] = {}
    for rung in (*sorted(best.values(), key=lambda r: r.seconds)[: count // 2], *lot, *found):
        if len(picked) < count:
            picked.setdefault(rung.words(), rung)
    return list(picked.values())


def best_that_fits(theirs: Sequence[Line], rows: int, tokens: int, room: float) -> Line | None:
    """The fastest setting of a batch of so many rows whose allocated peak is no more than `room` GiB."""
    able = [
        line
        for line in theirs
        if line.get("tokens") == tokens and line.get("batch") == rows and line.get("peak_GiB", float("inf")) <= room
    ]
    return max(able, key=lambda line: float(line["tokens_per_s"]), default=None)


def table(ours: Sequence[Line], theirs: Sequence[Line], beside: float) -> str:
    """Markdown. beside: GiB of a card that no allocator has."""
    found = ["| | card | tokens/s | peak, GiB (allocated / reserved / driver) | Unsloth's best that fits | times |"]
    found.append("| --- | --- | --- | --- | --- | --- |")
    for line in ours:
        if line.get("what") not in ("caps", "bound"):
            continue
        room = line.get("most_GiB") or line["card"] - beside
        peer = best_that_fits(theirs, line["rows"], line["tokens"], room)
        told = "none" if peer is None else f"{peer['tokens_per_s']:,} ({peer['setting']}, {peer['peak_GiB']})"
        name = f"{line['rows']} x {line['tokens']:,}"
        where = f"{line['card']:g} GiB" if line["what"] == "caps" else f"<= {line['most_GiB']} GiB"
        if "tokens_per_s" not in line:
            found.append(f"| {name} | {where} | failed | | {told} | |")
            continue
        peaks = " / ".join(str(line.get(key, "-")) for key in ("peak_GiB", "reserved_GiB", "driver_GiB"))
        times = "-" if peer is None else f"{line['tokens_per_s'] / peer['tokens_per_s']:.2f}"
        found.append(f"| {name} | {where} | {line['tokens_per_s']:,} | {peaks} | {told} | {times} |")
    return "\n".join(found)
