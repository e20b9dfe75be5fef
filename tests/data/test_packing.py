"""Packing: every example exactly once, nothing overlaps, nothing is cut but text, and hardly any space is lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.order import mix, shuffled
from halfbyte.data.packing import pack

items = st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=60)


@settings(max_examples=200, deadline=None)
@given(items=items, tokens=st.integers(16, 40), documents=st.integers(1, 12), window=st.integers(1, 70))
def test_every_item_once_and_in_bounds(items: list[tuple[int, bool]], tokens: int, documents: int, window: int) -> None:
    cut = np.asarray([c for _, c in items], dtype=np.bool_)
    lengths = np.asarray([n if c else min(n, tokens) for n, c in items], dtype=np.int64)
    packing = pack(lengths, cut, tokens, documents, window)

    assert packing.first[0] == 0 and packing.first[-1] == len(packing.item)
    for row in range(packing.rows):
        mine = slice(packing.first[row], packing.first[row + 1])
        assert 1 <= len(packing.item[mine]) <= documents
        assert packing.length[mine].sum() <= tokens
    for item, length in enumerate(lengths):
        segments = np.flatnonzero(packing.item == item)
        assert len(segments) == 1 or cut[item]
        spans = sorted(zip(packing.offset[segments].tolist(), packing.length[segments].tolist(), strict=True))
        at = 0
        for offset, size in spans:
            assert offset == at and size >= 1
            at += size
        assert at == length
    assert packing.documents() <= documents + 1


@settings(max_examples=100, deadline=None)
@given(items=items)
def test_best_fit_is_never_worse_than_twice_the_least(items: list[tuple[int, bool]]) -> None:
    lengths = np.asarray([n for n, _ in items], dtype=np.int64)
    packing = pack(lengths, np.zeros(len(items), dtype=np.bool_), 40, 1000)
    assert packing.rows <= max(len(items) and 1, 2 * -(-int(lengths.sum()) // 40))


def test_best_fit_takes_the_fullest_row() -> None:
    packing = pack(np.asarray([6, 7, 3, 4]), np.zeros(4, dtype=np.bool_), 10, 10)
    rows = [sorted(packing.item[a:b].tolist()) for a, b in zip(packing.first, packing.first[1:], strict=False)]
    assert sorted(rows) == [[0, 3], [1, 2]] and packing.efficiency == 1.0


def test_text_fills_the_gaps_of_chats() -> None:
    packing = pack(np.asarray([7, 33]), np.asarray([False, True]), 10, 10)
    assert packing.rows == 4 and packing.efficiency == 1.0
    assert packing.length.tolist() == [7, 3, 10, 10, 10]


def test_text_never_leaves_a_tail_of_one_token() -> None:
    packing = pack(np.asarray([11]), np.asarray([True]), 10, 10)
    assert packing.length.tolist() == [9, 2]


def test_chats_of_natural_lengths_fill_98_percent() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 3000), 20, 2048).astype(np.int64)
    assert pack(lengths, np.zeros(3000, dtype=np.bool_), 2048, 255).efficiency > 0.995


def test_a_row_is_a_mixture_of_lengths() -> None:
    # Falling lengths alone make rows of one length each (0.1 here), and then batches are not drawn at random.
    lengths = np.random.default_rng(0).integers(40, 120, 3000)
    packing = pack(lengths, np.zeros(3000, dtype=np.bool_), 2048, 255)
    spread = [np.std(packing.length[a:b]) for a, b in pairwise(packing.first)]
    assert np.mean(spread) > 0.5 * np.std(lengths) and packing.efficiency > 0.98


def test_a_repeated_packing_is_the_same() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 500)
    cut = np.arange(500) % 7 == 0
    first, second = (pack(lengths, cut, 128, 31) for _ in range(2))
    assert all(np.array_equal(getattr(first, f), getattr(second, f)) for f in ("item", "offset", "length", "first"))


def test_splitmix64_is_the_published_one() -> None:
    # The first outputs of the generator seeded with 0 (state advances by the golden gamma) are widely published.
    gamma = 0x9E3779B97F4A7C15
    states = np.asarray([0, gamma, 2 * gamma % 2**64], dtype=np.uint64)
    assert [hex(v) for v in mix(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_shuffles_are_permutations_of_their_keys_only(count: int) -> None:
    order = shuffled(count, (3, 1))
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, shuffled(count, (3, 1)))
    if count > 2:
        assert not np.array_equal(order, shuffled(count, (3, 2))) and not np.array_equal(order, shuffled(count, (4, 1)))


def test_shuffles_stay_the_same_for_good() -> None:
    assert shuffled(8, (0, 0)).tolist() == GOLDEN


GOLDEN = [5, 4, 1, 0, 2, 7, 6, 3]


def test_windows_cost_hardly_any_space_and_little_memory() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 40_000), 20, 2048).astype(np.int64)
    cut = np.zeros(len(lengths), dtype=np.bool_)
    whole, parts = (pack(lengths, cut, 2048, 255, window) for window in (1 << 20, 4096))
    assert parts.efficiency > 0.99 and whole.efficiency - parts.efficiency < 0.005
