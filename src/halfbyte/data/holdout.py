"""Holding out: which examples are kept from training, so that what is learned by heart does not count as learned.

By the hash of an example's group, or of its tokens where no group is named, and the seed: so the split does not depend on the
order of the lines, and neither a group nor an example that occurs twice, in one source or in two, is on both sides. Every source
gives its share. Cost: a sort.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.order import mix
from halfbyte.data.pieces import Pieces
from halfbyte.data.report import Report
from halfbyte.data.tokens import Tokens
from halfbyte.errors import DataError

Marks = NDArray[np.uint64]


def hold_out(
    sources: list[Tokens], whole: list[Pieces], wanted: float, seed: int, report: Report
) -> tuple[list[Pieces], list[Pieces]]:
    """Splits off a share of the examples of every source (`wanted` below 1), or so many in all, spread by size.

    Raises `DataError` (`data.empty`) where nothing could be learned any more, or nothing held out.
    """
    if not wanted:
        return whole, [part.take(np.zeros(len(part), dtype=np.bool_)) for part in whole]
    marks = [_marks(source, pieces, seed) for source, pieces in zip(sources, whole, strict=True)]
    held = np.unique(np.concatenate([_first(mark, k) for mark, k in zip(marks, _counts(marks, wanted), strict=True)]))
    kept: list[Pieces] = []
    away: list[Pieces] = []
    for number, (source, pieces) in enumerate(zip(sources, whole, strict=True)):
        mixed = _mixed(source, pieces.example, seed)
        out = (
            held[np.minimum(np.searchsorted(held, mixed), len(held) - 1)] == mixed if len(held) else np.zeros(len(mixed), np.bool_)
        )
        kept.append(pieces.take(~out))
        away.append(pieces.take(out))
        report.sources[number].held_out = len(away[-1].examples)
    if not sum(map(len, kept)) or not sum(map(len, away)):
        message = "one example, or one group of them, cannot be both learned and held out"
        raise DataError(message, hint="set `data.eval: 0`, or name held-out sources", code="data.empty")
    return kept, away


def _mixed(source: Tokens, example: NDArray[np.int64], seed: int) -> Marks:
    return mix(source.marks[example] ^ mix(np.asarray([seed], dtype=np.uint64)))


def _marks(source: Tokens, pieces: Pieces, seed: int) -> Marks:
    """The mark of every example, sorted; several pieces are one example."""
    return np.sort(_mixed(source, pieces.examples, seed))


def _counts(marks: list[Marks], wanted: float) -> list[int]:
    """How many examples each source gives: its part, and at least one in all."""
    sizes = [len(mark) for mark in marks]
    if wanted < 1:
        counts = [round(wanted * size) for size in sizes]
    else:
        if wanted >= sum(sizes):
            message = f"`data.eval: {wanted:g}` would hold out all {sum(sizes):,} examples"
            raise DataError(message, hint="hold out fewer, or a share such as 0.05", code="data.empty")
        exact = [wanted * size / sum(sizes) for size in sizes]
        counts = [int(x) for x in exact]
        by_rest = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_rest[: round(wanted) - sum(counts)]:
            counts[i] += 1
    if not any(counts):
        counts[max(range(len(sizes)), key=lambda i: sizes[i])] = 1
    return counts


def _first(marks: Marks, count: int) -> Marks:
    """The smallest marks, of `count` examples or a little more where a group is larger; never all there are."""
    chosen = np.unique(marks[:count])
    return chosen[:-1] if len(chosen) and chosen[-1] == marks[-1] else chosen
