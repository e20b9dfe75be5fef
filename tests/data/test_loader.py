"""The loader: batches by position alone, labels and boundaries right, weights and remainders accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.data.batch import IGNORED
from halfbyte.data.config import DataConfig
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import Prepared, prepare

T = 64


@pytest.fixture
def made(tokenizer: Any, jsonl: Callable[..., Path], tmp_path: Path, chat: Callable[..., Any]) -> Callable[..., Prepared]:
    def make(count: int = 30, texts: int = 0, **weights: float) -> Prepared:
        chats = [chat(f"One {i}?", "two" * (1 + i % 7)) for i in range(count)]
        sources: list[dict[str, Any]] = [{"path": str(jsonl(chats, "chats.jsonl")), "weight": weights.get("chats", 1.0)}]
        if texts:
            records = [{"text": f"{i}: The quick brown fox. " * (1 + i % 9)} for i in range(texts)]
            sources.append({"path": str(jsonl(records, "texts.jsonl")), "weight": weights.get("texts", 1.0)})
        return prepare(DataConfig(train=sources, eval=0, tokens=T), tokenizer, 0, tmp_path / "cache")

    return make


def seen(loader: Loader, epoch: int) -> Counter[int]:
    """How often each example occurs in the rows of an epoch."""
    found: Counter[int] = Counter()
    pieces, packing, order = loader._epoch(epoch)
    assert sorted(order.tolist()) == list(range(packing.rows))
    for item in pieces[packing.item].tolist():
        found[int(loader.data.example_ids[item])] += 1
    return found


def test_labels_positions_and_boundaries(made: Callable[..., Prepared]) -> None:
    data = made(30, texts=6).train
    loader = Loader(data, T, 4, seed=0)
    for step in range(loader.steps(1)):
        batch = loader.at(step)
        assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (4, T)
        assert batch.cu_seqlens.shape == (4, loader.documents + 1) and batch.cu_seqlens.dtype == torch.int32
        assert batch.trained_tokens == int((batch.labels != IGNORED).sum()) > 0
        for r in range(4):
            bounds = batch.cu_seqlens[r].tolist()
            assert bounds[0] == 0 and bounds[-1] == T and bounds == sorted(bounds)
            documents = [(a, b) for a, b in pairwise(bounds) if b > a]
            assert len(documents) - len(batch.example_ids[r]) in (0, 1)
            for number, (start, stop) in enumerate(documents):
                assert batch.position_ids[r, start:stop].tolist() == list(range(stop - start))
                assert batch.labels[r, stop - 1] == IGNORED
                labels, following = batch.labels[r, start : stop - 1], batch.input_ids[r, start + 1 : stop]
                assert bool(((labels == IGNORED) | (labels == following)).all())
                if number == len(batch.example_ids[r]):  # the leftover belongs to nobody
                    assert bool((labels == IGNORED).all()) and bool((batch.input_ids[r, start:stop] == data.pad_id).all())


def test_documents_are_the_examples_themselves(made: Callable[..., Prepared]) -> None:
    data = made(30).train
    source = data.sources[0]
    batch = Loader(data, T, 4, seed=0).at(0)
    for r, examples in enumerate(batch.example_ids):
        for number, example in enumerate(examples):
            start, stop = batch.cu_seqlens[r, number : number + 2].tolist()
            span = slice(source.offsets[example], source.offsets[example + 1])
            assert batch.input_ids[r, start:stop].tolist() == source.ids[span].tolist()
            wanted = np.where(source.trained[span][1:], source.ids[span][1:].astype(np.int64), IGNORED)
            assert batch.labels[r, start : stop - 1].tolist() == wanted.tolist()
            assert data.where(example) == f"{source.file_names[0]}:{example + 1}"


def test_every_example_once_an_epoch_in_another_order(made: Callable[..., Prepared]) -> None:
    data = made(30).train
    loader = Loader(data, T, 4, seed=0)
    for epoch in range(3):
        assert seen(loader, epoch) == Counter(range(30))
    rows = [
        tuple(map(tuple, Loader(data, T, 1, seed).batch(epoch, 0).input_ids.tolist())) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(rows)) == 3


def test_a_batch_is_a_function_of_its_position(made: Callable[..., Prepared]) -> None:
    data = made(30, texts=3, chats=1.3).train
    walked = Loader(data, T, 3, seed=5)
    batches = [walked.at(step) for step in range(walked.steps(3))]
    for step in (len(batches) - 1, 0, len(batches) // 2):
        fresh = Loader(data, T, 3, seed=5).at(step)
        assert torch.equal(fresh.input_ids, batches[step].input_ids) and torch.equal(fresh.labels, batches[step].labels)
        assert torch.equal(fresh.cu_seqlens, batches[step].cu_seqlens) and fresh.example_ids == batches[step].example_ids


def test_remainder_rows_open_the_next_epoch(made: Callable[..., Prepared]) -> None:
    data = made(31).train
    single = Loader(data, T, 1, seed=0)
    stream = [single.at(step).input_ids[0].tolist() for step in range(3 * single.rows(0))]
    loader = Loader(data, T, 4, seed=0)
    assert loader.rows(0) % 4
    numbers = [(epoch, index) for epoch in range(3) for index in range(loader.batches(epoch))]
    for step, (epoch, index) in enumerate(numbers):
        batch = loader.batch(epoch, index)
        assert loader.position(step)[0] == epoch
        if 4 * step + 4 <= len(stream):
            assert batch.input_ids.tolist() == stream[4 * step : 4 * step + 4]
    assert loader.steps(3) == ceil(sum(loader.rows(e) for e in range(3)) / 4)
    assert loader.steps(0.5) == ceil(ceil(loader.rows(0) / 2) / 4) and loader.steps(1e-6) == 1


@pytest.mark.parametrize("weight", [0.5, 2.0, 1.25, 0.001])
def test_weights(weight: float, made: Callable[..., Prepared]) -> None:
    data = made(40, texts=8, chats=weight).train
    loader = Loader(data, T, 2, seed=0)
    chats = [{e: n for e, n in seen(loader, epoch).items() if e < 40} for epoch in range(2)]
    for counts in chats:
        assert sum(counts.values()) == round(40 * weight)
        assert all(int(weight) <= n <= int(weight) + 1 for n in counts.values())
    if weight in (0.5, 1.25):
        assert chats[0] != chats[1]  # another sample every epoch


def test_a_weight_that_rounds_to_nothing_still_trains(made: Callable[..., Prepared]) -> None:
    loader = Loader(made(10, chats=0.01).train, T, 2, seed=0)
    assert loader.rows(0) == 1 and loader.at(0).trained_tokens > 0


@pytest.mark.parametrize("m", [1, 2, 4])
def test_microbatches_flatten_rows(m: int, made: Callable[..., Prepared]) -> None:
    loader = Loader(made(30, texts=4).train, T, 4, seed=0)
    batch = loader.at(0)
    for number, micro in enumerate(batch.microbatches(m)):
        rows = slice(number * m, number * m + m)
        assert torch.equal(micro.input_ids, batch.input_ids[rows].reshape(1, -1))
        assert torch.equal(micro.labels, batch.labels[rows].reshape(1, -1))
        assert torch.equal(micro.position_ids, batch.position_ids[rows].reshape(1, -1))
        assert micro.cu_seqlens.shape == (m * loader.documents + 1,) and micro.cu_seqlens.dtype == torch.int32
        wanted = sorted({int(c) + r * T for r in range(m) for c in batch.cu_seqlens[number * m + r]})
        assert micro.cu_seqlens[: len(wanted)].tolist() == wanted
        assert bool((micro.cu_seqlens[len(wanted) :] == m * T).all())
        # Every position restart is a boundary, and the other way round.
        restarts = (micro.position_ids[0] == 0).nonzero().flatten().tolist()
        assert restarts == wanted[:-1]


def test_a_microbatch_must_divide_the_batch(made: Callable[..., Prepared]) -> None:
    with pytest.raises(AssertionError, match="does not divide"):
        list(Loader(made(9).train, T, 4, seed=0).at(0).microbatches(3))


def test_a_sweep_sees_every_row_once_and_fills_up_with_nothing(made: Callable[..., Prepared]) -> None:
    data = made(31).train
    loader = Loader(data, T, 4, seed=0)
    batches = list(loader.sweep())
    assert Counter(e for b in batches for row in b.example_ids for e in row) == Counter(range(31))
    assert sum(b.trained_tokens for b in batches) == data.trained()
    last = batches[-1]
    assert last.input_ids.shape == (4, T) and last.example_ids[-1] == []
    assert bool((last.labels[-1] == IGNORED).all()) and last.cu_seqlens[-1].tolist() == [0] + [T] * loader.documents
