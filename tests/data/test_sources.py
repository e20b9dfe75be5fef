"""Sources: every file kind gives the same records, and a bad line is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datafiles import ROWS, WRITERS
from halfbyte.data import files, hub
from halfbyte.data.config import SourceConfig
from halfbyte.data.problems import Problems
from halfbyte.data.sources import Record, open_source
from halfbyte.errors import DataError


def read(path: Path | str, **options: Any) -> tuple[list[Record], Problems]:
    problems = Problems()
    return list(open_source(SourceConfig(path=str(path), **options), Path("unused")).read(problems)), problems


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_records(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    records, problems = read(tmp_path / name)
    assert [r.data for r in records] == ROWS and problems.total == 0


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    WRITERS["a.csv"](tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    WRITERS["a.parquet"](tmp_path / "a.parquet")
    places = {
        name: [str(r.where).removeprefix(str(tmp_path)) for r in read(tmp_path / name)[0]]
        for name in ("a.json", "a.csv", "a.jsonl", "a.parquet")
    }
    assert places["a.json"] == ["/a.json:2", "/a.json:6"]
    assert places["a.csv"] == ["/a.csv:2", "/a.csv:4"]  # the first record spans two lines
    assert places["a.jsonl"] == ["/a.jsonl:1", "/a.jsonl:3"]
    assert places["a.parquet"] == ["/a.parquet row 1", "/a.parquet row 2"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', "a.jsonl:2: expected a JSON object, got expecting value at column"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl:2: expected an object with named fields, got a list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: expected UTF-8 text, got byte 0xff at position 8"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}\n]', "a.json:3: expected a JSON array of objects"),
        ("a.json", b'[\n{"a": 1}\n{"a": 2}\n]', "a.json:3: expected `,` or `]` after an element"),
        ("a.json", b'[{"a": 1}', "a.json:1: expected `,` or `]` after an element, got the end of the file"),
        ("a.json", b'[{"a": 1},\n 3]', "a.json:2: expected an object with named fields, got a number"),
        ("a.jsonl", b'{"a": "\x01"}\n', "a.jsonl:1: expected a JSON object, got invalid control character at column 8"),
        ("a.json", b'[{"a": "\x01"}]\n', "a.json:1: expected a JSON array of objects, got invalid control character"),
        ("a.csv", b"a,b\n1,2\n3\n4,5,6\n", "a.csv:3: expected 2 columns, got 1"),
        ("a.csv", b"a,b\n1,2\n4,5,6\n", "a.csv:3: expected 2 columns, got 3"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, "a.json:1: expected a JSON array of objects, got brackets nested too deeply"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: expected a JSON object, got brackets nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl:1: expected a JSON object, got exceeds the limit"),
        ("a.csv", b'a,b\n1,2\n"4"5,6\n', "a.csv:3: expected a record of comma-separated values"),
        ("a.parquet", b"nonsense", "a.parquet row 1: expected a Parquet file"),
        ("a.arrow", b"nonsense", "a.arrow row 1: expected an Arrow file"),
    ],
)
def test_a_bad_line_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    _, problems = read(tmp_path / name)
    with pytest.raises(DataError) as caught:
        problems.raise_any()
    assert said in str(caught.value) and caught.value.code == "data.bad-file" and caught.value.hint


def test_good_lines_after_bad_ones_are_still_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('nonsense\n{"a": 1}\n' * 15)
    records, problems = read(tmp_path / "a.jsonl")
    assert len(records) == problems.total == 15
    with pytest.raises(DataError, match=r"15 examples are wrong(.|\n)*and 5 more"):
        problems.raise_any()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.xz", "a.txt.bz2", "a.json.zst"])
def test_a_damaged_compressed_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08\x00nonsense")
    with pytest.raises(DataError, match=rf"{name}` cannot be read") as caught:
        read(tmp_path / name)
    assert caught.value.code == "data.bad-file"


def test_an_array_is_read_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": "é" * n, "b": [n, {"c": -1.5}]} for n in range(30)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    wanted = read(path)[0]
    whole = files.chunks
    for size in (1, 7, 64):
        monkeypatch.setattr(files, "chunks", lambda file, size=size: whole(file, size))
        records, problems = read(path)
        assert records == wanted and [r.data for r in records] == rows and not problems.total


def test_a_saved_dataset_is_its_arrow_files(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    records, _ = read(tmp_path / "saved")
    assert [r.data for r in records] == ROWS


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text('{"a": 1}\n')
    first = files.digest([path], cache)
    assert not (cache / "digests").exists()  # just written: its time of change is not believed yet
    monkeypatch.setattr(files, "SETTLED", -1.0)
    assert files.digest([path], cache) == first
    monkeypatch.setattr(files, "_hash", lambda _: pytest.fail("read again"))
    assert files.digest([path], cache) == first
    monkeypatch.undo()
    path.write_text('{"a": 2}\n')
    assert files.digest([path], cache) != first


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nb\xe9d\n")
    with pytest.raises(DataError, match=r"a\.txt:2: byte 0xe9"):
        read(tmp_path / "a.txt")


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "blocks.txt").write_text("\n\none\ntwo\n\n \nthree\n")
    (tmp_path / "book.md").write_text("# One\n\ntwo\n")
    assert [r.data["text"] for r in read(tmp_path / "lines.txt")[0]] == ["one", "two", "three"]
    assert [(r.data["text"], r.where.line) for r in read(tmp_path / "blocks.txt")[0]] == [("one\ntwo", 3), ("three", 7)]
    assert [r.data["text"] for r in read(tmp_path / "book.md")[0]] == ["# One\n\ntwo\n"]


def test_directories_and_patterns(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", ".hidden/3.jsonl", "a/notes.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    source = open_source(SourceConfig(path=str(tmp_path)), tmp_path)
    assert [r.data["text"] for r in source.read(Problems())] == ["a/1.jsonl", "b/2.jsonl"]
    assert "notes.docx" in source.notes[0]
    assert [r.data["text"] for r in read(f"{tmp_path}/**/*2.jsonl")[0]] == ["b/2.jsonl"]


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "./missing", "/no/such/folder/x", "~/no/*.json", "~nobody/a.json", "./" + "a" * 300]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "load", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="no data file") as caught:
        open_source(SourceConfig(path=path), Path("unused"))
    assert caught.value.code == "data.not-found"


def test_odd_files(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"`\.docx` are not read"):
        read(tmp_path / "a.docx")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        read(tmp_path / "d")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="means nothing for local files"):
        read(tmp_path / "a.jsonl", revision="main")


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    before = open_source(SourceConfig(path=str(path)), tmp_path).digest
    path.write_text('{"text": "b"}\n')
    assert open_source(SourceConfig(path=str(path)), tmp_path).digest != before


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, _ = read("somebody/chats", split="test", config="en", revision="abc")
    assert asked == [(("somebody/chats", "en"), {"split": "test", "revision": "abc"})]
    assert [r.data for r in records] == ROWS and str(records[1].where) == "somebody/chats[test] row 2"


def _refuse(error: Exception) -> Callable[..., Any]:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise error

    return load_dataset


def test_a_hub_dataset_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cases = {
        "data.not-found": datasets.exceptions.DatasetNotFoundError("no"),
        "data.unreachable": ConnectionError("no route\nmore"),
        "data.refused": ValueError("Unknown split"),
    }
    for code, error in cases.items():
        monkeypatch.setattr(datasets, "load_dataset", _refuse(error))
        with pytest.raises(DataError) as caught:
            read("somebody/chats")
        assert caught.value.code == code and caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/chats.jsonl.gz", "chats"),
        ("chats/**/*.jsonl", "chats"),
        ("a/part-*.parquet", "part-*"),
        ("a/b/*", "b"),
        ("*.txt", "*.txt"),
    ],
)
def test_how_a_source_is_called(path: str, name: str) -> None:
    assert files.stem(path) == name
