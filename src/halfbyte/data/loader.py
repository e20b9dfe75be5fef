"""The loader: which rows make which batch. It has no state, so a run resumes by naming a position.

The rows of epoch 0, 1, 2, ... follow each other in one endless stream, each epoch packed and shuffled anew from (seed, epoch);
batch number k is the rows k*R to (k+1)*R-1 of that stream. So every batch has exactly R rows, every row is seen once an epoch,
and the rows that do not fill a batch at the end of an epoch open the next one, together with its first rows. Cost: packing is
about four seconds for a million examples, once an epoch; the packing of a large set is kept in a file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.data.batch import IGNORED, Batch
from halfbyte.data.order import shuffled
from halfbyte.data.packing import Packing, pack
from halfbyte.data.tokens import TokenSet

Int = NDArray[np.int64]
PACKED = 1  # raise it when packing changes
WORTH = 50_000  # pieces from which on a packing is kept
SAMPLE, PACK, ROWS = 1, 2, 3  # what a permutation is for: keeps the three independent


class Loader:
    """Batches of `batch` rows of `tokens` tokens each."""

    def __init__(self, data: TokenSet, tokens: int, batch: int, seed: int) -> None:
        assert len(data) > 0, "prepare() refuses an empty set"
        self.data, self.tokens, self.batch_rows, self.seed = data, tokens, batch, seed
        self._epoch = lru_cache(maxsize=3)(self._pack)
        self._counts: list[int] = []
        self._documents = max(8, tokens // 8)
        # Eight more than the first epoch needs, so that no later one is held back; then the number stays.
        limit, needed = self._documents, self._epoch(0)[1].documents()
        self._documents = -(-(needed + 1) // 8) * 8
        if needed >= limit - 1:  # the first epoch was held back itself
            self._epoch.cache_clear()

    @property
    def documents(self) -> int:
        """D: documents a row can hold, the leftover included; the same in every batch."""
        return self._documents

    def _pack(self, epoch: int) -> tuple[Int, Packing, Int]:
        """The pieces that an epoch visits, their packing, and the order of the rows."""
        pieces = self._pieces(epoch)
        packing = self._kept(epoch, len(pieces))
        if packing is None:
            packing = pack(self.data.lengths[pieces], self.data.cut[pieces], self.tokens, self._documents - 1)
            if (place := self._place(epoch, len(pieces))) is not None:
                packing.save(place)
        return pieces, packing, shuffled(packing.rows, (self.seed, epoch, ROWS))

    def _kept(self, epoch: int, pieces: int) -> Packing | None:
        place = self._place(epoch, pieces)
        return None if place is None else Packing.load(place, self.tokens)

    def _place(self, epoch: int, pieces: int) -> Path | None:
        """Where the packing of an epoch is kept, if it is worth a file."""
        if self.data.cache is None or pieces < WORTH:
            return None
        parts = [PACKED, self.data.digest, self.tokens, self._documents, self.seed, epoch]
        return self.data.cache / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.npy"

    def _pieces(self, epoch: int) -> Int:
        """Each source as often as an epoch visits it: whole times all of it, the rest from where the last epoch stopped."""
        chosen: list[Int] = []
        for number, visits in enumerate(self.data.weights):
            mine = np.flatnonzero(self.data.source == number)
            wanted = round(visits * len(mine))
            whole, part = divmod(wanted, max(1, len(mine)))
            chosen += [mine] * whole + [np.sort(mine[self._walk(len(mine), part, epoch, number)])]
        pieces = np.concatenate(chosen)
        if not len(pieces):  # a weight so small that it rounds to nothing still shows one piece
            pieces = shuffled(len(self.data), (self.seed, epoch, SAMPLE))[:1]
        return pieces[shuffled(len(pieces), (self.seed, epoch, PACK))]

    def _walk(self, size: int, part: int, epoch: int, source: int) -> Int:
        """`part` of `size` places: the next ones of an endless walk, round after round, each round in an order of its own."""
        if not part:
            return np.zeros(0, dtype=np.int64)
        first, last = epoch * part // size, ((epoch + 1) * part - 1) // size
        rounds = [shuffled(size, (self.seed, SAMPLE, source, r)) for r in range(first, last + 1)]
        start = epoch * part - first * size
        return np.concatenate(rounds)[start : start + part]

    def rows(self, epoch: int) -> int:
        """Rows of an epoch: the same every time, unless a weight is fractional or cuts fall differently."""
        while len(self._counts) <= epoch:
            self._counts.append(self._epoch(len(self._counts))[1].rows)
        return self._counts[epoch]

    def packing(self, epoch: int = 0) -> Packing:
        """How the rows of an epoch are laid."""
        return self._epoch(epoch)[1]

    def efficiency(self, epoch: int = 0) -> float:
        """Share of an epoch's positions that hold a token of an example."""
        return self._epoch(epoch)[1].efficiency

    def _before(self, epoch: int) -> int:
        return sum(self.rows(e) for e in range(epoch))

    def batches(self, epoch: int) -> int:
        """Batches that begin in an epoch."""
        start, stop = self._before(epoch), self._before(epoch + 1)
        return -(-stop // self.batch_rows) - -(-start // self.batch_rows)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that begin in the first epoch; later epochs may have one fewer (`batches(epoch)`)."""
        return self.batches(0)

    def steps(self, epochs: float, at_most: int | None = None) -> int:
        """Batches needed to see so many epochs: at least one, the last one filled up from what follows.

        at_most: epochs are not counted beyond so many batches.
        """
        whole, rows = int(epochs), 0
        for epoch in range(whole):
            if at_most is not None and rows >= at_most * self.batch_rows:
                return at_most
            rows += self.rows(epoch)
        rows += math.ceil((epochs - whole) * self.rows(whole) - 1e-9) if epochs > whole else 0
        steps = max(1, -(-rows // self.batch_rows))
        return steps if at_most is None else min(steps, at_most)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, row) of the first row of the batch number `step`."""
        row, epoch = step * self.batch_rows, 0
        while row >= self.rows(epoch):
            row -= self.rows(epoch)
            epoch += 1
        return epoch, row

    def at(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch number `step` of the run, counted from 0; with `ranks` processes, the rows of the one numbered `rank`.

        The parts of all processes, one after the other, are the rows of the whole batch, whatever their number; each knows what
        the loss of the whole batch is divided by.
        """
        assert 0 <= rank < ranks <= self.batch_rows, f"{ranks} processes cannot share a batch of {self.batch_rows} rows"
        epoch, row = self.position(step)
        places: list[tuple[int, int]] = []
        while len(places) < self.batch_rows:
            if row == self.rows(epoch):
                epoch, row = epoch + 1, 0
            places.append((epoch, row))
            row += 1
        begin, end = (self.batch_rows * r // ranks for r in (rank, rank + 1))
        batch = self._build(places[begin:end], end - begin)
        if ranks == 1:
            return batch
        tokens, weight = self._total(places)
        return replace(batch, trained_tokens=tokens, weight=weight)

    def batch(self, epoch: int, index: int) -> Batch:
        """The batch number `index` of those that begin in `epoch`."""
        assert 0 <= index < self.batches(epoch), f"epoch {epoch} has {self.batches(epoch)} batches"
        return self.at(-(-self._before(epoch) // self.batch_rows) + index)

    def sweep(self) -> Iterator[Batch]:
        """Every row of epoch 0 once, for evaluation; the last batch is filled up with empty rows."""
        rows = self.rows(0)
        for at in range(0, rows, self.batch_rows):
            yield self._build([(0, row) for row in range(at, min(at + self.batch_rows, rows))], self.batch_rows)

    def _total(self, places: list[tuple[int, int]]) -> tuple[int, float]:
        """Tokens to learn in rows that need not be built, and their weight."""
        tokens = 0
        weights: list[float] = []
        for epoch, row in places:
            pieces, packing, order = self._epoch(epoch)
            for segment in range(packing.first[order[row]], packing.first[order[row] + 1]):
                piece = pieces[packing.item[segment]]
                source = self.data.sources[self.data.source[piece]]
                start = self.data.start[piece] + packing.offset[segment]
                span = slice(start + 1, start + packing.length[segment])
                learned = np.asarray(source.trained[span])
                tokens += int(learned.sum())
                weights += [float(learned.sum())] if source.weights is None else source.weights[span][learned].tolist()
        return tokens, math.fsum(weights)

    def _build(self, places: list[tuple[int, int]], count: int) -> Batch:
        """The rows at `places`, followed by empty ones up to `count`."""
        shape = (count, self.tokens)
        ids = np.full(shape, self.data.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        weights = np.ones(shape, dtype=np.float32) if self.data.weighted else None
        bounds = np.full((count, self._documents + 1), self.tokens, dtype=np.int32)
        bounds[:, 0] = 0
        examples: list[list[int]] = [[] for _ in range(count)]
        for r in range(count):
            at = 0
            if r < len(places):
                into = _Row(ids[r], labels[r], positions[r], None if weights is None else weights[r], bounds[r], examples[r])
                at = self._lay(*places[r], into)
            positions[r, at:] = np.arange(self.tokens - at)
        learned = labels != IGNORED
        trained = int(learned.sum())
        weight = float(trained) if weights is None else math.fsum(weights[learned].tolist())
        tensors = [torch.from_numpy(part) for part in (ids, labels, positions, bounds)]
        weighed = None if weights is None else torch.from_numpy(weights)
        return Batch(tensors[0], tensors[1], tensors[2], tensors[3], examples, trained, weight, weighed)

    def _lay(self, epoch: int, row: int, into: _Row) -> int:
        """Lays one row's documents into its slices; returns where the leftover begins."""
        pieces, packing, order = self._epoch(epoch)
        number = order[row]
        at = 0
        for place, segment in enumerate(range(packing.first[number], packing.first[number + 1])):
            piece = pieces[packing.item[segment]]
            source = self.data.sources[self.data.source[piece]]
            start = self.data.start[piece] + packing.offset[segment]
            stop = at + int(packing.length[segment])
            span = slice(start, start + packing.length[segment])
            into.ids[at:stop] = source.ids[span]
            into.labels[at : stop - 1] = np.where(source.trained[span][1:], into.ids[at + 1 : stop], IGNORED)
            if into.weights is not None and source.weights is not None:
                into.weights[at : stop - 1] = source.weights[span][1:]
            into.positions[at:stop] = np.arange(stop - at)
            at = into.bounds[place + 1] = stop
            into.examples.append(int(self.data.example[piece]) + sum(len(s) for s in self.data.sources[: self.data.source[piece]]))
        return at


class _Row(NamedTuple):
    """The slices that one row is laid into."""

    ids: Int
    labels: Int
    positions: Int
    weights: NDArray[np.float32] | None
    bounds: NDArray[np.int32]
    examples: list[int]
