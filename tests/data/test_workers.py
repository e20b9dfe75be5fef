"""Processes that tokenise: the same result as one process, mistakes in the same words, and a clear word when one dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import workers
from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.errors import DataError

pytestmark = pytest.mark.cpu


@pytest.fixture
def run(tokenizer: Any, jsonl: Any, tmp_path: Path) -> Any:
    def make(records: list[Any], processes: int, **options: Any) -> Prepared:
        config = DataConfig(train=[{"path": str(jsonl(records)), **options}], eval=0.1, tokens=64, workers=processes)
        return prepare(config, tokenizer, 0, tmp_path / f"cache-{processes}-{options.get('limit')}")

    return make


def chats(count: int, chat: Any) -> list[Any]:
    records = [chat(f"One {i}?", "two " * (i % 9 + 1)) for i in range(count)]
    records[40]["messages"][1]["weight"] = 0.5
    records[70] = chat("Nobody answers?")
    return records


def test_any_number_of_processes_gives_the_same(run: Any, chat: Any) -> None:
    records = chats(700, chat)
    sets = [run(records, processes) for processes in (0, 1, 3)]
    first = sets[0].train.sources[0]
    assert len(first) == 699 and first.weights is not None and any("no answer" in note for note in sets[0].report.notes)
    for other in sets[1:]:
        mine = other.train.sources[0]
        for part in ("ids", "trained", "weights", "offsets", "lines", "files", "learned", "marks"):
            assert getattr(mine, part).tolist() == getattr(first, part).tolist(), part
        assert other.digest == sets[0].digest and other.end_ids == sets[0].end_ids and other.report == sets[0].report


@pytest.mark.parametrize("limit", [2, 256, 300, 699, 5000])
def test_a_limit_is_kept(limit: int, run: Any, chat: Any) -> None:
    one, two = (run(chats(700, chat), processes, limit=limit).train.sources[0] for processes in (0, 2))
    assert len(one) == min(limit, 699) and one.ids.tolist() == two.ids.tolist() and one.lines.tolist() == two.lines.tolist()


def test_mistakes_are_the_same_in_the_same_order(run: Any, chat: Any, jsonl: Any) -> None:
    records = [chat(f"One {i}?", "two") if i % 50 else {"messages": i} for i in range(1, 901)]
    said = []
    for processes in (0, 2):
        with pytest.raises(DataError) as caught:
            run(records, processes)
        said.append(str(caught.value))
    assert said[0] == said[1] and "18 examples are wrong" in said[0] and "data.jsonl:50: `messages`" in said[0]


def test_an_error_of_the_template_comes_across(run: Any, chat: Any, make_tokenizer: Any, jsonl: Any, tmp_path: Path) -> None:
    silent = make_tokenizer(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = DataConfig(train=[{"path": str(jsonl([chat("One?", "two")] * 3))}], eval=0, workers=1)
    with pytest.raises(DataError) as caught:
        prepare(config, silent, 0, tmp_path / "c")
    assert caught.value.code == "data.no-eot" and caught.value.hint


def test_a_process_that_dies_is_said(run: Any, chat: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begin = workers._Pool._begin

    def killed(pool: Any, process: Any, job: bytes) -> None:
        begin(pool, process, job)
        os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(workers._Pool, "_begin", killed)
    with pytest.raises(DataError, match="ended unexpectedly") as caught:
        run([chat(f"One {i}?", "two") for i in range(2000)], 2)
    assert caught.value.code == "data.worker" and not list((tmp_path / "cache-2-None" / "tokens").iterdir())


def test_small_sources_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(40)), raising=False)
    assert workers.crew(None, workers.WORTH - 1).processes == 0 and workers.crew(None, workers.WORTH).processes == workers.MOST
    assert workers.crew(3, 0) == (3, False, False) and workers.crew(0, 1 << 40) == (0, True, True)
