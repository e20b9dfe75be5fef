"""Orders that are a function of numbers, for good.

Why not a generator: a run resumed in another year, under another numpy, must see the same rows in the same order, and numpy
promises no such thing of its streams. A 64-bit mix (splitmix64, Steele et al. 2014) of (keys..., index) sorts instead.
Cost: one sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, element by element: uint64 in and out."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def shuffled(count: int, keys: Sequence[int]) -> NDArray[np.int64]:
    """A permutation of `range(count)` that depends on `keys` only."""
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix(state ^ np.uint64(key))
    with np.errstate(over="ignore"):
        ranks = mix(state + mix(np.arange(count, dtype=np.uint64)))
    return np.argsort(ranks, kind="stable").astype(np.int64)
