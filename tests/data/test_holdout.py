"""Held-out examples: by share or count, from every source, and nothing that belongs together on both sides."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.tokens import TokenSet
from halfbyte.errors import DataError


@pytest.fixture
def split(tokenizer: Any, jsonl: Any, tmp_path: Any) -> Any:
    def make(*sources: list[dict[str, Any]], eval: float = 0.2, seed: int = 0, **options: Any) -> Prepared:
        files = [jsonl(records, f"{'ab'[number]}.jsonl") for number, records in enumerate(sources)]
        config = DataConfig(train=[{"path": str(f), **options} for f in files], eval=eval, tokens=64)
        return prepare(config, tokenizer, seed, tmp_path / "cache")

    return make


def contents(data: TokenSet) -> set[bytes]:
    spans = zip(data.source.tolist(), data.start.tolist(), data.stop.tolist(), strict=True)
    return {data.sources[s].ids[a:b].tobytes() for s, a, b in spans}


def test_every_source_gives_its_share_or_its_part_of_a_count(split: Any, chat: Any) -> None:
    a, b = ([chat(f"{word} {i}?", "two") for i in range(n)] for word, n in (("One", 60), ("And", 20)))
    shares = split(a, b)
    assert {name: len(part) for name, part in shares.eval.items()} == {"a": 12, "b": 4}
    counted = split(a, b, eval=10)
    assert {name: len(part) for name, part in counted.eval.items()} == {"a": 8, "b": 2}
    with pytest.raises(DataError, match="would hold out all 80 examples"):
        split(a, b, eval=80)


def test_a_group_stays_on_one_side(split: Any, chat: Any) -> None:
    records = [{**chat(f"One {i}?", "two"), "talk": i % 12} for i in range(60)]
    for seed in range(4):
        prepared = split(records, group="talk", seed=seed)
        held = {e % 12 for e in prepared.eval["a"].example.tolist()}
        learned = {e % 12 for e in prepared.train.example.tolist()}
        assert held and learned and not held & learned and len(prepared.eval["a"]) == 5 * len(held)
        assert len(held) == 3  # 12 examples are wanted: two groups are too few
    with pytest.raises(DataError, match="or one group of them"):
        split([{**r, "talk": "same"} for r in records], group="talk")
    with pytest.raises(DataError, match=r"a\.jsonl:1: `talk`: expected a group"):
        split([{**r, "talk": None} for r in records], group="talk")


def test_an_example_in_two_sources_is_not_on_both_sides(split: Any, chat: Any) -> None:
    a = [chat(f"One {i}?", "two") for i in range(40)]
    b = [chat(f"One {i}?", "two") for i in range(20, 60)]
    prepared = split(a, b)
    held = set().union(*map(contents, prepared.eval.values()))
    assert len(held) >= 8 and not held & contents(prepared.train)


def test_nothing_to_choose_from(split: Any, chat: Any) -> None:
    with pytest.raises(DataError, match="cannot be both learned and held out"):
        split([chat("One?", "two")] * 5)
