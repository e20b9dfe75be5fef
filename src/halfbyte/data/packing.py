"""Packing: examples laid into rows of exactly T tokens.

Whole examples go by best fit, each into the fullest row that still takes it: long ones first, longest first; then the middle in
the order given; the shortest at last, to fill the gaps. What is left over stays below a percent or so on real chats, as with
strictly falling lengths, but a row is a mixture: falling lengths alone make rows of examples of one length (within a row the
spread of lengths is 0.1 to 0.3 of the whole set's, this way 0.5 to 0.7), and so batches that are not drawn at random. Plain text
is then cut to fill the gaps and rows of its own. Nothing is ever cut but plain text.
Why rows of one length: memory is the same in every step (DESIGN of the rows), and no padding is computed. Cost: one big-integer
operation an example (the free spaces are bits, so "the smallest space that fits" is the lowest bit above).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Rows as segments. Row r holds the segments `first[r]:first[r+1]`, one after the other from position 0.

    item, offset, length: int64 [S]: segment s is `length[s]` tokens of item `item[s]`, from its token `offset[s]` on.
    """

    tokens: int
    item: Int
    offset: Int
    length: Int
    first: Int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.first) - 1

    @property
    def efficiency(self) -> float:
        """Share of all positions that hold a token of an example."""
        return float(self.length.sum() / max(1, self.rows * self.tokens))

    def documents(self) -> int:
        """The most segments in one row, a leftover at the end counted as one."""
        if not self.rows:
            return 1
        sums = np.concatenate([[0], np.cumsum(self.length)])
        left = self.tokens - (sums[self.first[1:]] - sums[self.first[:-1]])
        return int((np.diff(self.first) + (left > 0)).max())


LONG = 1 / 4  # of a row: longer ones are laid first
SHORT = 0.3  # share of the examples kept for the gaps


class _Rows:
    """Rows under construction: their segments, and the free spaces as bits."""

    def __init__(self, tokens: int, documents: int) -> None:
        self.tokens, self.documents = tokens, documents
        self.segments: list[list[tuple[int, int, int]]] = []
        self.free: list[int] = []
        self._spaces: list[list[int]] = [[] for _ in range(tokens + 1)]
        self._bits = 0

    def put(self, item: int, length: int) -> None:
        """Puts a whole item into the fullest row that takes it, or into a new one."""
        above = self._bits >> length
        if above:
            space = length + (above & -above).bit_length() - 1
            row = self._spaces[space].pop()
            if not self._spaces[space]:
                self._bits &= ~(1 << space)
        else:
            row = self.new()
        self.add(row, item, 0, length)
        if self.free[row] and len(self.segments[row]) < self.documents:
            self._spaces[self.free[row]].append(row)
            self._bits |= 1 << self.free[row]

    def new(self) -> int:
        self.segments.append([])
        self.free.append(self.tokens)
        return len(self.free) - 1

    def add(self, row: int, item: int, offset: int, length: int) -> None:
        self.segments[row].append((item, offset, length))
        self.free[row] -= length


def pack(lengths: Int, cut: NDArray[np.bool_], tokens: int, documents: int) -> Packing:
    """Packs items of the given lengths, in the given order among equals, at most `documents` segments a row.

    lengths int64 [N], at least 1, at most `tokens` where `cut` (bool [N]) is false. Deterministic.
    """
    assert documents >= 1 and bool(np.all(lengths >= 1)) and bool(np.all(cut | (lengths <= tokens)))
    rows = _Rows(tokens, documents)
    for item in _order(np.flatnonzero(~cut), lengths, tokens).tolist():
        rows.put(item, int(lengths[item]))
    _fill(rows, np.flatnonzero(cut), lengths)
    segments = [segment for row in rows.segments for segment in row]
    table = np.asarray(segments, dtype=np.int64).reshape(-1, 3)
    first = np.cumsum([0, *(len(row) for row in rows.segments)], dtype=np.int64)
    return Packing(tokens, table[:, 0], table[:, 1], table[:, 2], first)


def _order(whole: Int, lengths: Int, tokens: int) -> Int:
    """The order in which whole items are laid: long falling, middle as given, short falling."""
    size = lengths[whole]
    if not len(whole):
        return whole
    long = size > LONG * tokens
    short = ~long & (size <= np.quantile(size, SHORT))
    falling = [part[np.argsort(-lengths[part], kind="stable")] for part in (whole[long], whole[short])]
    return np.concatenate([falling[0], whole[~long & ~short], falling[1]])


def _fill(rows: _Rows, texts: Int, lengths: Int) -> None:
    """Lays texts end to end into the spaces that are left, then into new rows."""
    row = 0
    for item in texts.tolist():
        offset, rest = 0, int(lengths[item])
        while rest:
            # A single token learns nothing: it is neither a space worth filling nor a tail worth leaving.
            while row < len(rows.free) and (rows.free[row] < min(2, rest) or len(rows.segments[row]) >= rows.documents):
                row += 1
            if row == len(rows.free):
                rows.new()
            take = min(rest, rows.free[row])
            if rest - take == 1 and take > 2:
                take -= 1
            rows.add(row, item, offset, take)
            offset, rest = offset + take, rest - take
