"""Pieces: what of each example goes into rows, once the rule for long ones (`data.too_long`) has been applied.

Why apart from the tokens: rules and row lengths change without anything being tokenised again. Cost: a few numbers an
example.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import checks
from halfbyte.data.config import DataConfig
from halfbyte.data.report import Report, SourceReport
from halfbyte.data.tokens import Tokens

Int = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Pieces of one source: the example each comes from, and its place. int64 [P] each."""

    example: Int
    start: Int
    stop: Int

    def __len__(self) -> int:
        return len(self.example)

    @property
    def examples(self) -> Int:
        """The examples they come from, each once: rising, as the pieces are."""
        return self.example[np.flatnonzero(np.diff(self.example, prepend=-1))]

    def take(self, keep: NDArray[np.bool_]) -> Pieces:
        """Some of them."""
        return Pieces(self.example[keep], self.start[keep], self.stop[keep])


def fit(source: Tokens, config: DataConfig, report: Report, label: str = "") -> Pieces:
    """Applies `too_long`, counts what that costs, and leaves out pieces that would learn nothing."""
    start, stop, size = source.offsets[:-1], source.offsets[1:], config.tokens
    example = np.arange(len(source), dtype=np.int64)
    trained = source.learned
    lengths = stop - start
    counts = SourceReport(
        label + source.name, source.shape, len(source), int(lengths.sum()), int(trained.sum()), int(lengths.max())
    )
    report.sources.append(counts)
    pieces = Pieces(example, start, stop)
    long = lengths > size
    if source.shape != "text" and long.any():
        if config.too_long in ("drop", "error"):
            lost = int(trained[long].sum())
            where = [source.where(int(i)) for i in np.flatnonzero(long)[:3]]
            checks.too_long(counts.longest, size, int(long.sum()), lost, counts.trained, where, config.too_long)
            counts.dropped, counts.dropped_trained = int(long.sum()), lost
            pieces = pieces.take(~long)
        elif config.too_long == "truncate_right":
            counts.truncated = int(long.sum())
            pieces = Pieces(example, start, np.minimum(stop, start + size))
        elif config.too_long == "truncate_left":
            counts.truncated = int(long.sum())
            pieces = Pieces(example, np.maximum(start, stop - size), stop)
        else:
            counts.split = int(long.sum())
            parts = -(-lengths // size)
            example = np.repeat(example, parts)
            number = np.arange(len(example)) - np.repeat(np.cumsum(parts) - parts, parts)
            begin = start[example] + number * size
            pieces = Pieces(example, begin, np.minimum(begin + size, stop[example]))
    learned = source.count(pieces.example, pieces.start, pieces.stop) > 0
    if not learned.all():
        report.notes.append(f"{source.name}: {int((~learned).sum()):,} pieces left out, since nothing in them would be learned")
    return pieces.take(learned)
