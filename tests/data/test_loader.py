"""The loader: batches by position alone, labels and boundaries right, weights and remainders accounted for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.data import loader as loader_module
from halfbyte.data.batch import IGNORED, Batch
from halfbyte.data.config import DataConfig
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.kernels.cross_entropy import Head
from halfbyte.objectives import sft
from support import chats, tiny_tokenizer

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


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_processes_shares_the_same_batches_and_resumes_anywhere(ranks: int, made: Callable[..., Prepared]) -> None:
    data = made(30, texts=4, chats=1.3).train
    whole = Loader(data, T, 5, seed=2)
    for step in range(whole.steps(2)):
        batch = whole.at(step)
        # A fresh loader is a process that resumes here; those of another number of processes come to the same rows.
        parts = [Loader(data, T, 5, seed=2).at(step, rank, ranks) for rank in range(ranks)]
        for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name
        assert [row for part in parts for row in part.example_ids] == batch.example_ids
        assert {part.trained_tokens for part in parts} == {batch.trained_tokens}
        assert {part.weight for part in parts} == {batch.weight} == {float(batch.trained_tokens)}
    with pytest.raises(AssertionError, match="cannot share"):
        whole.at(0, 5, 6)


WALK = """
import json, sys
from pathlib import Path
from data.test_loader import told
from halfbyte.data.config import DataConfig
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import prepare
from support import tiny_tokenizer

data, cache, rank, ranks, first, last = json.loads(sys.argv[1])
loader = Loader(prepare(DataConfig(**data), tiny_tokenizer(), 3, Path(cache)).train, 128, 5, seed=3)
print(json.dumps([row for step in range(first, last) for row in told(step, loader.at(step, rank, ranks))]))
"""


def told(step: int, part: Batch) -> list[list[Any]]:
    """A batch as plain data, row by row."""
    tensors = (part.input_ids, part.labels, part.position_ids, part.cu_seqlens)
    rows = zip(part.example_ids, *(tensor.tolist() for tensor in tensors), strict=True)
    return [[step, part.trained_tokens, part.weight, *row] for row in rows]


@pytest.mark.slow
def test_real_processes_come_to_the_same_rows_and_resume_anywhere(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """Two processes, then three that go on in the middle of an epoch, each with hashes of its own, against this one; a mixture with
    a share, a temperature and a cap."""
    files = [str(jsonl([{**c, "w": 1 + i % 2} for i, c in enumerate(chats(n))], f"{n}.jsonl")) for n in (60, 14, 30)]
    train = [{"path": files[0], "columns": {"weight": "w"}}, {"path": files[1]}, {"path": files[2], "share": 0.2}]
    data = {"train": train, "eval": 0.1, "tokens": 128, "mix": {"temperature": 2, "cap": 40}}
    loader = Loader(prepare(DataConfig(**data), tiny_tokenizer(), 3, tmp_path / "cache").train, 128, 5, seed=3)
    steps = loader.steps(2.5)
    middle = loader.batches(0) - 1  # the batch that ends one epoch and opens the next
    assert steps > middle + 3 and loader.position(middle)[0] == 0 and loader.position(middle + 1)[0] == 1

    def walk(ranks: int, first: int, last: int) -> list[Any]:
        running = []
        for rank in range(ranks):
            work = json.dumps([data, str(tmp_path / "cache"), rank, ranks, first, last])
            paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONHASHSEED": str(rank + 1), "PYTHONPATH": os.pathsep.join(paths)}
            command = [sys.executable, "-c", WALK, work]
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in running]
        assert [process.returncode for process in running] == [0] * ranks
        rows = [row for one in said for row in json.loads(one)]
        return sorted(rows, key=lambda row: row[0])  # stable: within a step, rank after rank

    whole = [row for step in range(steps) for row in told(step, loader.at(step))]
    assert len(whole) == 5 * steps and len({str(row[3:]) for row in whole}) > 3 * steps and any(row[1] != row[2] for row in whole)
    assert walk(2, 0, middle) + walk(3, middle, steps) == whole


@pytest.fixture
def weighted(tokenizer: Any, jsonl: Callable[..., Path], tmp_path: Path, chat: Callable[..., Any]) -> Prepared:
    """Chats whose answers weigh 0.5 to 2, 0 in one turn; every third example counts double; and a source without weights."""
    chats = [{**chat(f"One {i}?", "two", "Three?", "four" * (i % 5 + 1)), "w": 2 if i % 3 == 0 else 1} for i in range(30)]
    for i, record in enumerate(chats):
        record["messages"][1]["weight"] = 0 if i == 7 else 0.5
    first = {"path": str(jsonl(chats, "a.jsonl")), "columns": {"weight": "w"}}
    second = {"path": str(jsonl([chat("One?", "five")], "b.jsonl"))}
    return prepare(DataConfig(train=[first, second], eval=0, tokens=T), tokenizer, 0, tmp_path / "cache")


def test_weights_are_those_of_examples_and_messages(weighted: Prepared, tokenizer: Any) -> None:
    data = weighted.train
    first, second = data.sources
    assert first.weights is not None and second.weights is None
    for i in range(30):
        span = slice(first.offsets[i], first.offsets[i + 1])
        ids, weights = (part[span][first.trained[span]] for part in (first.ids, first.weights))
        runs = [tokenizer.decode(ids[weights == w]) for w in sorted(set(weights.tolist()))]
        double = 2 if i % 3 == 0 else 1
        answers = ["two<|im_end|>", "four" * (i % 5 + 1) + "<|im_end|>"]
        assert runs == (answers[1:] if i == 7 else answers)
        assert sorted(set(weights.tolist())) == ([double] if i == 7 else [0.5 * double, double])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("m", [1, 2])
def test_the_loss_of_a_batch_is_the_same_split_any_way(ranks: int, m: int, weighted: Prepared, tokenizer: Any) -> None:
    rows, width = 12, 8
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(len(tokenizer), width, generator=generator)
    matrix = torch.randn(len(tokenizer), width, generator=generator, requires_grad=True)
    loader = Loader(weighted.train, T, rows, seed=0)
    whole = loader.at(0)
    assert whole.weights is not None
    flat, labels = table[whole.input_ids].reshape(-1, width), whole.labels.flatten()
    each = torch.nn.functional.cross_entropy((flat @ matrix.T).double(), labels, ignore_index=IGNORED, reduction="none")
    learned = labels != IGNORED
    weights = whole.weights.flatten()[learned].double()
    wanted = (each[learned] * weights).sum() / weights.sum()
    assert abs(float((wanted - each[learned].mean()).detach())) > 1e-3  # the weights are no formality
    shares = []
    for rank in range(ranks):
        part = loader.at(0, rank, ranks)
        for micro in part.microbatches(m):
            shares.append(sft.loss(table[micro.input_ids], micro.labels, Head(matrix), part.weight, weights=micro.weights))
    torch.testing.assert_close(torch.stack(shares).sum().double(), wanted, rtol=1e-6, atol=0)
    (mine,) = torch.autograd.grad(torch.stack(shares).sum(), matrix)
    (truth,) = torch.autograd.grad(wanted, matrix)
    torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6)


def test_a_kept_packing_is_the_packing(made: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(40, texts=3, chats=1.5).train
    plain = [Loader(data, T, 2, seed=0).at(step) for step in range(9)]
    monkeypatch.setattr(loader_module, "WORTH", 1)
    for _ in range(2):  # written, then read
        kept = Loader(data, T, 2, seed=0)
        assert all(torch.equal(kept.at(step).labels, batch.labels) for step, batch in enumerate(plain))
        monkeypatch.setattr(loader_module, "pack", lambda *_: pytest.fail("packed again"))
    monkeypatch.undo()
    assert data.cache is not None
    monkeypatch.setattr(loader_module, "WORTH", 1)
    for file in data.cache.iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(Loader(data, T, 2, seed=0).at(3).labels, plain[3].labels)
