"""Mixing: how often each source is visited, and what the loader makes of it epoch after epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from halfbyte.data.config import DataConfig
from halfbyte.data.loader import Loader
from halfbyte.data.mixing import told, visits
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.errors import DataError

SIZES = [1000, 10]


def mixed(*sources: dict[str, Any], sizes: list[int] = SIZES, learned: list[int] | None = None, **mix: Any) -> list[float]:
    config = DataConfig(train=[{"path": "x", **s} for s in sources], mix=mix)
    return [round(v, 9) for v in visits(config, sizes, learned or [100 * n for n in sizes])]


def test_each_way_of_saying_it() -> None:
    assert mixed({}, {}) == [1, 1]
    assert mixed({"weight": 0.2}, {"weight": 3}) == [0.2, 3]
    assert mixed({"count": 50}, {"count": 25}) == [0.05, 2.5]
    assert mixed({}, {}, cap=100) == [0.1, 1]
    assert mixed({"count": 500}, {}, cap=100) == [0.5, 1]
    # A tenth of what is learned: the other source learns 90 %.
    found = mixed({}, {"share": 0.1})
    assert found[0] == 1 and found[1] * 10 / (1000 + found[1] * 10) == pytest.approx(0.1)
    # Shares are of tokens, not of examples.
    assert mixed({}, {"share": 0.1}, learned=[100_000, 10_000])[1] == pytest.approx(found[1] / 10)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e9])
def test_temperature(temperature: float) -> None:
    found = mixed({}, {}, temperature=temperature)
    taken = [visit * size for visit, size in zip(found, SIZES, strict=True)]
    assert sum(taken) == pytest.approx(1010)  # the epoch stays as long
    assert taken[0] / taken[1] == pytest.approx((1000 / 10) ** (1 / temperature), rel=1e-6)


def test_bad_mixtures() -> None:
    for bad in ([{"weight": 2, "count": 3}], [{"share": 0.5}], [{"share": 0.5}, {"share": 0.5}, {}], [{"count": 0}]):
        with pytest.raises(ValidationError):
            DataConfig(train=[{"path": "x", **s} for s in bad])
    with pytest.raises(DataError, match=r"`x` has nothing to learn, so it cannot be 10%"):
        mixed({}, {"share": 0.1}, learned=[1, 0])


def test_it_is_told() -> None:
    assert told(["a", "b"], [1, 1], [5, 5]) == []
    assert told(["a", "b"], [1, 0.5], [60, 80]) == [
        "a: 1 times an epoch, 60.0% of what is learned",
        "b: 0.5 times an epoch, 40.0% of what is learned",
    ]


@pytest.fixture
def two(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Any) -> Any:
    def make(**small: Any) -> Prepared:
        large = jsonl([chat(f"One {i}?", "two three") for i in range(60)], "large.jsonl")
        other = jsonl([chat(f"And {i}?", "four") for i in range(7)], "small.jsonl")
        sources = [{"path": str(large)}, {"path": str(other), **small}]
        return prepare(DataConfig(train=sources, eval=0, tokens=64), tokenizer, 0, tmp_path / "cache")

    return make


@pytest.mark.parametrize(("small", "each"), [({"count": 3}, 3), ({"count": 17}, 17), ({"weight": 0.5}, 4), ({"weight": 2}, 14)])
def test_an_epoch_takes_what_was_asked(small: dict[str, Any], each: int, two: Any) -> None:
    loader = Loader(two(**small).train, 64, 2, seed=0)
    total: Counter[int] = Counter()
    for epoch in range(7):
        pieces = loader._epoch(epoch)[0]
        mine = Counter(loader.data.example_ids[pieces][loader.data.source[pieces] == 1].tolist())
        assert sum(mine.values()) == each
        total += mine
        # Nobody is seen again before everybody was seen.
        assert max(total.values()) - min(total.get(e, 0) for e in range(60, 67)) <= 1
    assert set(total.values()) == {each}  # seven epochs are a whole number of rounds


def test_a_share_is_met(two: Any) -> None:
    prepared = two(share=0.4)
    assert any(note.endswith("40.0% of what is learned") for note in prepared.report.notes)
    loader = Loader(prepared.train, 64, 2, seed=0)
    pieces = loader._epoch(0)[0]
    learned = prepared.train.trained_each()[pieces]
    assert learned[prepared.train.source[pieces] == 1].sum() / learned.sum() == pytest.approx(0.4, abs=0.01)
