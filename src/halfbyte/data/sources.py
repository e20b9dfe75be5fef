"""Where examples come from: files, directories, globs, Hub datasets and `python-docs`, as one stream of records.

Why our own readers for text formats: a bad line must be reported as `file:line`, and a record must keep its place for good,
so that a step that went wrong can name its examples. Cost: one pass over the bytes for the digest (the cache key), one to read.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from halfbyte.data import hub, python_docs
from halfbyte.data.config import SourceConfig
from halfbyte.data.problems import Problems, Where, kind_of
from halfbyte.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
PYTHON_DOCS = "python-docs"


class Record(NamedTuple):
    """One record as it was read: columns and values, and where it stood."""

    where: Where
    data: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A source that exists: its display name, a digest of its content, and a function that streams its records."""

    name: str
    digest: str
    read: Callable[[Problems], Iterator[Record]]
    notes: tuple[str, ...] = field(default=())


def open_source(config: SourceConfig, cache_dir: Path) -> Source:
    """Finds out what `config.path` means. Raises `DataError` (`data.not-found`) for what is neither a file nor a dataset."""
    if config.path == PYTHON_DOCS:
        path = python_docs.build(cache_dir)
        return Source(PYTHON_DOCS, _digest([path]), lambda problems: _read_jsonl(path, problems))
    files, notes = _files(config.path)
    if not files:
        if _looks_local(config.path):
            hint = "check the path; it is relative to where the command runs"
            raise DataError(f"no data file at `{config.path}`", hint=hint, code="data.not-found")
        dataset = hub.load(config.path, config.config, config.split, config.revision)
        return Source(config.path, dataset.digest, lambda problems: (Record(w, d) for w, d in dataset.records()))
    for given, name in ((config.config, "config"), (config.revision, "revision")):
        if given is not None:
            hint = "leave it out, or name a Hub dataset"
            raise DataError(f"`{name}: {given}` means nothing for local files (`{config.path}`)", hint=hint, code="data.not-found")

    def read(problems: Problems) -> Iterator[Record]:
        for file in files:
            yield from _reader(file)(file, problems)

    return Source(_name(config.path), _digest(files), read, notes)


def _name(path: str) -> str:
    stem = Path(path).name
    for suffix in (".gz", *SUFFIXES):
        stem = stem.removesuffix(suffix)
    return stem or path


def _looks_local(path: str) -> bool:
    marks = path.startswith((".", "/", "~")) or any(c in path for c in "*?[\\") or path.count("/") > 1
    return marks or path.removesuffix(".gz").endswith(SUFFIXES)


def _files(path: str) -> tuple[list[Path], tuple[str, ...]]:
    """The data files that a path, directory or pattern names, in a fixed order, and what was passed over."""
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return [expanded], ()
    if expanded.is_dir():
        found = sorted(p for p in expanded.rglob("*") if p.is_file() and not _hidden(p.relative_to(expanded)))
        files = [p for p in found if p.name.removesuffix(".gz").endswith(SUFFIXES)]
        rest = [p.name for p in found if p not in set(files)]
        if not files:
            message = f"the directory `{path}` holds no data file"
            raise DataError(message, hint=f"known endings: {' '.join(SUFFIXES)} (also with .gz)", code="data.not-found")
        return files, (f"{path}: {len(rest)} other files passed over ({', '.join(rest[:3])})",) if rest else ()
    return sorted(Path(p) for p in glob.glob(str(expanded), recursive=True) if Path(p).is_file()), ()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _digest(files: list[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                sha.update(chunk)
    return sha.hexdigest()


def _open(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def _reader(file: Path) -> Callable[[Path, Problems], Iterator[Record]]:
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    readers: dict[str, Callable[[Path, Problems], Iterator[Record]]] = {
        ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv,
        ".parquet": _read_parquet, ".txt": _read_text, ".md": _read_document,
    }  # fmt: skip
    if kind not in readers:
        message = f"`{file}`: files ending in `{kind}` are not read"
        raise DataError(message, hint=f"known endings: {' '.join(SUFFIXES)} (also with .gz)", code="data.bad-file")
    return readers[kind]


def _read_jsonl(file: Path, problems: Problems) -> Iterator[Record]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield from _one(Where(str(file), number), line, problems)


def _one(where: Where, line: bytes, problems: Problems) -> Iterator[Record]:
    try:
        data = json.loads(line.decode("utf-8-sig" if where.line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        problems.add(where, "", "UTF-8 text", f"byte 0x{line[error.start]:02x} at position {error.start + 1}", "data.bad-file")
    except json.JSONDecodeError as error:
        problems.add(where, "", "a JSON object", f"{error.msg.lower()} at column {error.colno}", "data.bad-file")
    else:
        yield from _object(where, data, problems)


def _object(where: Where, data: Any, problems: Problems) -> Iterator[Record]:
    if isinstance(data, dict):
        yield Record(where, data)
    else:
        problems.add(where, "", "an object with named fields", kind_of(data), "data.bad-file")


def _text_of(file: Path) -> str:
    with _open(file) as stream:
        raw = stream.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = Where(str(file), raw.count(b"\n", 0, error.start) + 1)
        hint = "save the file as UTF-8"
        raise DataError(f"{where}: byte 0x{raw[error.start]:02x} is not UTF-8 text", hint=hint, code="data.bad-file") from error


def _read_json(file: Path, problems: Problems) -> Iterator[Record]:
    """An array of objects, walked element by element so that each keeps its line; otherwise one object a line."""
    text = _text_of(file)
    at = _skip(text, 0)
    if not text.startswith("[", at):
        yield from _read_jsonl(file, problems)
        return
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        where = Where(str(file), line)
        try:
            data, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            # What follows a syntax error inside an array cannot be told apart any more: this one ends the file.
            here = Where(str(file), error.lineno)
            problems.add(here, "", "a JSON array of objects", f"{error.msg.lower()} at column {error.colno}", "data.bad-file")
            return
        yield from _object(where, data, problems)
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            here = Where(str(file), text.count("\n", 0, at) + 1)
            problems.add(
                here,
                "",
                "`,` or `]` after an element",
                repr(text[at : at + 10]) if at < len(text) else "the end of the file",
                "data.bad-file",
            )
            return


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_csv(file: Path, problems: Problems) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    tabs = file.name.removesuffix(".gz").endswith(".tsv")
    reader = csv.DictReader(io.StringIO(_text_of(file), newline=""), delimiter="\t" if tabs else ",")
    line = 2  # a record may span lines: it is named by its first
    for row in reader:
        where, line = Where(str(file), line), reader.line_num + 1
        if None in row or None in row.values():
            wanted, got = len(reader.fieldnames or ()), sum(v is not None for k, v in row.items() if k is not None)
            got += len(cast("dict[Any, list[str]]", row).get(None, []))
            problems.add(where, "", f"{wanted} columns", str(got), "data.bad-file")
        else:
            yield Record(where, row)


def _read_parquet(file: Path, problems: Problems) -> Iterator[Record]:
    import pyarrow.parquet  # type: ignore[import-untyped]
    from pyarrow import ArrowInvalid

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for data in batch.to_pylist():
                number += 1
                yield Record(Where(str(file), number, "row"), data)
    except ArrowInvalid as error:
        problems.add(Where(str(file), number + 1, "row"), "", "a Parquet file", str(error)[:80], "data.bad-file")


def _read_text(file: Path, problems: Problems) -> Iterator[Record]:
    """One document a block where blank lines separate blocks; one document a line in a file without blank lines."""
    lines = _text_of(file).split("\n")
    if all(line.strip() for line in lines[:-1]):
        yield from (Record(Where(str(file), n), {"text": line}) for n, line in enumerate(lines, 1) if line.strip())
        return
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            yield Record(Where(str(file), number - len(block)), {"text": "\n".join(block)})
            block = []


def _read_document(file: Path, problems: Problems) -> Iterator[Record]:
    text = _text_of(file)
    if text.strip():
        yield Record(Where(str(file), 1), {"text": text})
