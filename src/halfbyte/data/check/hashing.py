"""Hashes of many tokens at once, in parts that fit the memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

CHUNK = 1_000_000  # tokens at work
Hash = NDArray[np.uint64]


def chunks(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of examples of about CHUNK tokens each; example i is `offsets[i]` to `offsets[i + 1]`."""
    first, count = 0, len(offsets) - 1
    while first < count:
        last = int(np.searchsorted(offsets, offsets[first] + CHUNK, side="right")) - 1
        last = min(max(last, first + 1), count)
        yield first, last
        first = last


def mix(values: Hash) -> Hash:
    """The 64-bit finaliser of MurmurHash3: neighbouring numbers become unrelated."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def in_order(
    ids: Hash, place: Hash, starts: NDArray[np.int64], stops: NDArray[np.int64], only: NDArray[np.bool_] | None = None
) -> Hash:
    """One hash an example of its tokens at their places (of those in `only`), uint64 [E]; 0 for an empty one."""
    terms = mix(ids + np.uint64(1)) * mix(place + np.uint64(1))
    if only is not None:
        terms *= only
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return np.asarray(total[stops] - total[starts], dtype=np.uint64)
