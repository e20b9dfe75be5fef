"""Packing: examples laid into rows of exactly T tokens.

Whole examples go by best fit, each into the fullest row that still takes it: long ones first, longest first; then the middle in
the order given; the shortest at last, to fill the gaps. What is left over stays below a percent or so on real chats, as with
strictly falling lengths, but a row is a mixture: falling lengths alone make rows of examples of one length (within a row the
spread of lengths is 0.1 to 0.3 of the whole set's, this way 0.5 to 0.7), and so batches that are not drawn at random. Plain text
is then cut to fill the gaps and rows of its own. Nothing is ever cut but plain text. All this goes on in windows of 65,536
examples; rows that have room left wait for the next one.
Why rows of one length: memory is the same in every step (DESIGN of the rows), and no padding is computed. Cost: one big-integer
operation an example (the free spaces are bits, so "the smallest space that fits" is the lowest bit above).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.cachefile import replacing

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
        return int((np.diff(self.first) + (self.left() > 0)).max())

    def left(self) -> Int:
        """Tokens at the end of each row that belong to nobody, int64 [rows]."""
        sums = np.concatenate([[0], np.cumsum(self.length)])
        return np.asarray(self.tokens - (sums[self.first[1:]] - sums[self.first[:-1]]), dtype=np.int64)

    def save(self, place: Path) -> None:
        """Keeps it in a file, for good or not at all."""
        sizes = np.diff(self.first)
        head = np.asarray([len(self.item), len(sizes)], dtype=np.int64)
        with replacing(place) as stream:
            np.save(stream, np.concatenate([head, self.item, self.offset, self.length, sizes]))

    @staticmethod
    def load(place: Path, tokens: int) -> Packing | None:
        """The packing kept in a file; None where there is none, or a damaged one."""
        try:
            numbers = np.load(place)
            n, rows = (int(number) for number in numbers[:2])
        except (OSError, ValueError, EOFError):
            return None
        if len(numbers) != 2 + 3 * n + rows:
            return None
        item, offset, length, sizes = np.split(numbers[2:], [n, 2 * n, 3 * n])
        return Packing(tokens, item, offset, length, np.concatenate([[0], np.cumsum(sizes)]))


LONG = 1 / 4  # of a row: longer ones are laid first
SHORT = 0.3  # share of the examples kept for the gaps
WINDOW = 1 << 16  # examples among which the best fit is looked for
OPEN = 1 << 10  # rows that stay open from one window to the next: the emptiest ones


class _Rows:
    """Rows under construction: their segments, and the free spaces as bits; finished rows are kept as arrays."""

    def __init__(self, tokens: int, documents: int) -> None:
        self.tokens, self.documents = tokens, documents
        self.segments: list[list[tuple[int, int, int]]] = []
        self.free: list[int] = []
        self._spaces: list[list[int]] = [[] for _ in range(tokens + 1)]
        self._bits = 0
        self._done: list[Int] = [np.zeros((0, 3), dtype=np.int64)]
        self._sizes: list[Int] = [np.zeros(1, dtype=np.int64)]

    def put(self, items: list[int], lengths: list[int]) -> None:
        """Puts whole items, each into the fullest row that takes it, or into a new one."""
        segments, free, spaces, bits, documents = self.segments, self.free, self._spaces, self._bits, self.documents
        for item, length in zip(items, lengths, strict=True):
            above = bits >> length
            if above:
                space = length + (above & -above).bit_length() - 1
                row = spaces[space].pop()
                if not spaces[space]:
                    bits &= ~(1 << space)
            else:
                row = self.new()
                space = self.tokens
            segments[row].append((item, 0, length))
            left = free[row] = space - length
            if left and len(segments[row]) < documents:
                spaces[left].append(row)
                bits |= 1 << left
        self._bits = bits

    def fill(self, items: list[int], lengths: list[int]) -> None:
        """Lays texts end to end into the spaces that are left, then into new rows."""
        row = 0
        for item, rest in zip(items, lengths, strict=True):
            offset = 0
            while rest:
                # A single token learns nothing: it is neither a space worth filling nor a tail worth leaving.
                while row < len(self.free) and (self.free[row] < min(2, rest) or len(self.segments[row]) >= self.documents):
                    row += 1
                if row == len(self.free):
                    self.new()
                take = min(rest, self.free[row])
                if rest - take == 1 and take > 2:
                    take -= 1
                self.segments[row].append((item, offset, take))
                self.free[row] -= take
                offset, rest = offset + take, rest - take

    def new(self) -> int:
        self.segments.append([])
        self.free.append(self.tokens)
        return len(self.free) - 1

    def close(self, keep: int) -> None:
        """Finishes all rows but the `keep` emptiest ones that still take something."""
        usable = [row for row, free in enumerate(self.free) if free and len(self.segments[row]) < self.documents]
        kept = set(sorted(usable, key=lambda row: (-self.free[row], row))[:keep])
        done = [segments for row, segments in enumerate(self.segments) if row not in kept]
        table = np.asarray([segment for segments in done for segment in segments], dtype=np.int64).reshape(-1, 3)
        self._done.append(table)
        self._sizes.append(np.asarray([len(segments) for segments in done], dtype=np.int64))
        order = sorted(kept)
        self.segments, self.free = [self.segments[row] for row in order], [self.free[row] for row in order]
        self._spaces, self._bits = [[] for _ in range(self.tokens + 1)], 0
        for row, free in enumerate(self.free):
            self._spaces[free].append(row)
            self._bits |= 1 << free

    def packing(self) -> Packing:
        table = np.concatenate(self._done)
        return Packing(self.tokens, table[:, 0], table[:, 1], table[:, 2], np.cumsum(np.concatenate(self._sizes)))


def pack(lengths: Int, cut: NDArray[np.bool_], tokens: int, documents: int, window: int = WINDOW) -> Packing:
    """Packs items of the given lengths, in the given order among equals, at most `documents` segments a row.

    lengths int64 [N], at least 1, at most `tokens` where `cut` (bool [N]) is false. Deterministic; memory besides the result is
    that of a window.
    """
    assert documents >= 1 and bool(np.all(lengths >= 1)) and bool(np.all(cut | (lengths <= tokens)))
    rows = _Rows(tokens, documents)
    for at in range(0, len(lengths), window):
        here = slice(at, at + window)
        whole = _order(np.flatnonzero(~cut[here]), lengths[here], tokens) + at
        texts = np.flatnonzero(cut[here]) + at
        rows.put(whole.tolist(), lengths[whole].tolist())
        rows.fill(texts.tolist(), lengths[texts].tolist())
        rows.close(OPEN if at + window < len(lengths) else 0)
    return rows.packing()


def _order(whole: Int, lengths: Int, tokens: int) -> Int:
    """The order in which whole items are laid: long falling, middle as given, short falling."""
    size = lengths[whole]
    if not len(whole):
        return whole
    long = size > LONG * tokens
    short = ~long & (size <= np.quantile(size, SHORT))
    falling = [part[np.argsort(-lengths[part], kind="stable")] for part in (whole[long], whole[short])]
    return np.concatenate([falling[0], whole[~long & ~short], falling[1]])
