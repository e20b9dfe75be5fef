"""Mixing: how often an epoch visits each source.

    weight       so many times all of it                                  (1: once)
    count        so many of its examples
    share        so much of all that an epoch learns, in tokens           (general data against forgetting: `share: 0.1`)
    cap          at most so many of its examples
    temperature  sizes ** (1 / temperature), as mT5 mixes languages (arXiv 2010.11934); the epoch stays as long

All of them come down to one number a source. What is a fraction of a source is taken from a shuffled round of it, and the next
epoch goes on where the last one stopped, so every example is seen before any is seen again. Cost: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.data.config import DataConfig
from halfbyte.errors import DataError


def visits(config: DataConfig, examples: Sequence[int], learned: Sequence[int]) -> tuple[float, ...]:
    """How often an epoch visits each source, from its number of examples and of tokens to learn.

    Raises `DataError` (`data.empty`) for a source with a share of its own that has nothing to learn.
    """
    mix = config.mix
    sizes = [min(n, mix.cap) if mix.cap else n for n in examples]
    plain = [i for i, s in enumerate(config.train) if s.count is None and s.share is None]
    total = sum(config.train[i].weight * sizes[i] for i in plain)
    heated = {i: config.train[i].weight * sizes[i] ** (1 / mix.temperature) for i in plain}
    found = [0.0] * len(examples)
    for i, source in enumerate(config.train):
        if i in heated and examples[i]:
            taken = source.weight * sizes[i] if mix.temperature == 1 else total * heated[i] / sum(heated.values())
            found[i] = taken / examples[i]
        elif source.count is not None and examples[i]:
            found[i] = source.count / examples[i]
    rest = sum(found[i] * learned[i] for i in range(len(found)))
    shares = [source.share or 0.0 for source in config.train]
    for i, share in enumerate(shares):
        if share and not learned[i]:
            message = f"`{config.train[i].path}` has nothing to learn, so it cannot be {share:.0%} of what is learned"
            raise DataError(message, hint="leave it out, or hold out less of it", code="data.empty")
        if share:
            found[i] = rest * share / (1 - sum(shares)) / learned[i]
    return tuple(found)


def told(names: Sequence[str], found: Sequence[float], learned: Sequence[int]) -> list[str]:
    """The mixture in words; nothing where every source is visited once."""
    if all(visit == 1 for visit in found):
        return []
    total = sum(visit * tokens for visit, tokens in zip(found, learned, strict=True)) or 1
    return [
        f"{name}: {visit:.4g} times an epoch, {visit * tokens / total:.1%} of what is learned"
        for name, visit, tokens in zip(names, found, learned, strict=True)
    ]
