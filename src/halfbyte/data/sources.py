"""Where examples come from: files, directories, globs, Hub datasets and `python-docs`, as one stream of records.

Why our own readers for text formats: a bad line must be reported as `file:line`, and a record must keep its place for good,
so that a step that went wrong can name its examples. Every reader streams: memory is bounded by the longest record, not by the
file. Lines of JSON travel as bytes (`Raw`) and become records where they are tokenised, in as many processes as there are.
Cost: one pass over the bytes.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from halfbyte.data import files, hub, python_docs
from halfbyte.data.config import SourceConfig
from halfbyte.data.problems import Problems, Where, kind_of
from halfbyte.errors import DataError

PYTHON_DOCS = "python-docs"
LONGEST = 1 << 26  # characters that one element of a JSON array may have
ROW = 1000  # bytes that a row of a Hub dataset is taken for
ROWS = 256  # of an Arrow or Parquet file at a time


class Raw(NamedTuple):
    """One record as the file has it: a line of JSON that nobody has parsed yet, or its columns and values."""

    where: Where
    data: bytes | dict[str, Any]


class Record(NamedTuple):
    """One record as it was read: columns and values, and where it stood."""

    where: Where
    data: dict[str, Any]


Stream = Callable[[Problems], Iterator[Raw]]


@dataclass(frozen=True)
class Source:
    """A source that exists: its display name, a digest of its content, and a function that streams its records, not yet parsed.

    size: bytes on disk, or about as many as the rows of a Hub dataset would take.
    """

    name: str
    digest: str
    raw: Stream
    notes: tuple[str, ...] = field(default=())
    size: int = 0

    def read(self, problems: Problems) -> Iterator[Record]:
        """Every record; what cannot be parsed is noted in `problems`."""
        for raw in self.raw(problems):
            record = parse(raw, problems)
            if record is not None:
                yield record


def at_hand(config: SourceConfig, cache_dir: Path) -> bool:
    """Whether `open_source` would neither download nor build anything."""
    if config.path == PYTHON_DOCS:
        return python_docs.place(cache_dir).exists()
    return bool(files.find(config.path)[0]) or (not files.looks_local(config.path) and hub.kept(config.path))


def open_source(config: SourceConfig, cache_dir: Path) -> Source:
    """Finds out what `config.path` means. Raises `DataError` (`data.not-found`) for what is neither a file nor a dataset."""
    if config.path == PYTHON_DOCS:
        path = python_docs.build(cache_dir)
        return Source(PYTHON_DOCS, files.digest([path], cache_dir), lambda _: _raw_lines(path), (), path.stat().st_size)
    found, notes = files.find(config.path)
    if not found:
        if files.looks_local(config.path):
            hint = "check the path; it is relative to where the command runs"
            raise DataError(f"no data file at `{config.path}`", hint=hint, code="data.not-found")
        dataset = hub.load(config.path, config.config, config.split, config.revision)
        return Source(config.path, dataset.digest, lambda _: (Raw(w, d) for w, d in dataset.records()), (), len(dataset.rows) * ROW)
    for given, name in ((config.config, "config"), (config.revision, "revision")):
        if given is not None:
            hint = "leave it out, or name a Hub dataset"
            raise DataError(f"`{name}: {given}` means nothing for local files (`{config.path}`)", hint=hint, code="data.not-found")
    readers = [(_reader(file), file) for file in found]

    def raw(problems: Problems) -> Iterator[Raw]:
        for read, file in readers:
            yield from read(file, problems)

    size = sum(file.stat().st_size for file in found)
    return Source(files.stem(config.path), files.digest(found, cache_dir), raw, notes, size)


def parse(raw: Raw, problems: Problems) -> Record | None:
    """A record from a line; None after a mistake was noted."""
    where, line = raw
    if isinstance(line, dict):
        return Record(where, line)
    try:
        data = json.loads(line.decode("utf-8-sig" if where.line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        problems.add(where, "", "UTF-8 text", f"byte 0x{line[error.start]:02x} at position {error.start + 1}", "data.bad-file")
    except json.JSONDecodeError as error:
        problems.add(where, "", "a JSON object", f"{_json(error)} at column {error.colno}", "data.bad-file")
    except (RecursionError, ValueError) as error:  # a thousand brackets, a number of a million digits
        problems.add(where, "", "a JSON object", _odd(error), "data.bad-file")
    else:
        if isinstance(data, dict):
            return Record(where, data)
        problems.add(where, "", "an object with named fields", kind_of(data), "data.bad-file")
    return None


def _json(error: json.JSONDecodeError) -> str:
    """Some of its messages end in the "at" of a place that we say ourselves."""
    return error.msg.lower().removesuffix(" at")


def _odd(error: Exception) -> str:
    return "brackets nested too deeply" if isinstance(error, RecursionError) else str(error)[:60].lower()


def _reader(file: Path) -> Callable[[Path, Problems], Iterator[Raw]]:
    readers: dict[str, Callable[[Path, Problems], Iterator[Raw]]] = {
        ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv,
        ".parquet": _read_parquet, ".arrow": _read_arrow, ".feather": _read_arrow, ".txt": _read_text, ".md": _read_document,
    }  # fmt: skip
    kind = files.kind_of_file(file.name)
    if kind not in readers:
        message = f"`{file}`: files ending in `{kind}` are not read"
        raise DataError(message, hint=f"known endings: {files.endings()}", code="data.bad-file")
    if kind in (".parquet", ".arrow", ".feather") and kind != file.suffix.lower():
        hint = "decompress it: these formats are compressed inside"
        raise DataError(f"`{file}`: a compressed {kind} file is not read", hint=hint, code="data.bad-file")
    return readers[kind]


def _read_jsonl(file: Path, problems: Problems) -> Iterator[Raw]:
    return _raw_lines(file)


def _raw_lines(file: Path) -> Iterator[Raw]:
    name = str(file)
    for number, line in enumerate(files.lines(file), 1):
        if not line.isspace() and line:
            yield Raw(Where(name, number), line)


def _read_json(file: Path, problems: Problems) -> Iterator[Raw]:
    """An array of objects, walked element by element so that each keeps its line; otherwise one object a line."""
    window = _Window(files.text(file))
    window.skip()
    if window.here() == "[":
        yield from _elements(window, str(file), problems)
    else:
        yield from _raw_lines(file)


SPACE = re.compile(r"[ \t\r\n]*")


class _Window:
    """A moving view of a text: grows at its end on demand, and forgets what was read. `line`: of the position `at`."""

    def __init__(self, parts: Iterator[str]) -> None:
        self.parts, self.text, self.at, self.line, self.done = parts, "", 0, 1, False

    def grow(self, wanted: int = 0) -> bool:
        """Adds to the text, until it has `wanted` more characters where so many are left; False when nothing is."""
        if self.done:
            return False
        kept, new = self.text[self.at :], []
        size = 0
        while size <= wanted:
            part = next(self.parts, None)
            if part is None:
                self.done = True
                break
            new.append(part)
            size += len(part)
        self.text, self.at = "".join([kept, *new]), 0
        return size > 0

    def skip(self) -> None:
        """Moves over white space."""
        while True:
            match = SPACE.match(self.text, self.at)
            assert match is not None
            self.to(match.end())
            if self.at < len(self.text) or not self.grow():
                return

    def to(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def here(self) -> str:
        return self.text[self.at : self.at + 1]


def _elements(window: _Window, name: str, problems: Problems) -> Iterator[Raw]:
    decoder = json.JSONDecoder()
    window.to(window.at + 1)
    window.skip()
    while window.here() != "]":
        where = Where(name, window.line)
        element = _element(window, where, decoder, problems)
        if element is None:
            return
        data, size = element
        window.to(window.at + size)
        if isinstance(data, dict):
            yield Raw(where, data)
        else:
            problems.add(where, "", "an object with named fields", kind_of(data), "data.bad-file")
        window.skip()
        if window.here() == ",":
            window.to(window.at + 1)
            window.skip()
        elif window.here() != "]":
            got = repr(window.text[window.at : window.at + 10]) if window.here() else "the end of the file"
            problems.add(Where(name, window.line), "", "`,` or `]` after an element", got, "data.bad-file")
            return


def _element(window: _Window, where: Where, decoder: json.JSONDecoder, problems: Problems) -> tuple[Any, int] | None:
    """One value and its length; None where the array cannot be read on: what follows a syntax error cannot be told apart."""
    while True:
        left = len(window.text) - window.at
        try:
            data, stop = decoder.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            ahead = window.text[window.at : error.pos]
            # It may only be cut off: twice as much text settles it, and a value as long as this is none.
            if left <= LONGEST and window.grow(left):
                continue
            here = Where(where.file, window.line + ahead.count("\n"))
            column = f" at column {len(ahead) - ahead.rfind(chr(10))}" if "\n" in ahead else ""
            problems.add(here, "", "a JSON array of objects", f"{_json(error)}{column}", "data.bad-file")
            return None
        except (RecursionError, ValueError) as error:
            problems.add(where, "", "a JSON array of objects", _odd(error), "data.bad-file")
            return None
        size = stop - window.at
        # A number at the very end of what was read so far may go on.
        if size < left or not window.grow():
            return data, size


def _read_csv(file: Path, problems: Problems) -> Iterator[Raw]:
    csv.field_size_limit(1 << 30)
    tabs = files.uncompressed(file.name).lower().endswith(".tsv")
    reader = csv.DictReader((line + "\n" for line in files.text_lines(file)), delimiter="\t" if tabs else ",", strict=True)
    line = 2  # a record may span lines: it is named by its first
    try:
        for row in reader:
            where, line = Where(str(file), line), reader.line_num + 1
            if None in row or None in row.values():
                wanted, got = len(reader.fieldnames or ()), sum(v is not None for k, v in row.items() if k is not None)
                got += len(cast("dict[Any, list[str]]", row).get(None, []))
                problems.add(where, "", f"{wanted} columns", str(got), "data.bad-file")
            else:
                yield Raw(where, row)
    except csv.Error as error:
        problems.add(Where(str(file), line), "", "a record of comma-separated values", str(error), "data.bad-file")


def _read_parquet(file: Path, problems: Problems) -> Iterator[Raw]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(ROWS)

    return _rows(file, batches, "a Parquet file", problems)


def _read_arrow(file: Path, problems: Problems) -> Iterator[Raw]:
    """Both forms: the file (Feather), and the stream that `datasets` writes."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(file)) as mapped:
            if mapped.read(6) == b"ARROW1":
                opened = pyarrow.ipc.open_file(mapped)
                whole = (opened.get_batch(number) for number in range(opened.num_record_batches))
            else:
                mapped.seek(0)
                whole = iter(pyarrow.ipc.open_stream(mapped))
            for batch in whole:
                yield from (batch.slice(at, ROWS) for at in range(0, batch.num_rows, ROWS))

    return _rows(file, batches, "an Arrow file", problems)


def _rows(file: Path, batches: Callable[[], Iterator[Any]], what: str, problems: Problems) -> Iterator[Raw]:
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in batches():
            batch.validate(full=True)  # Arrow trusts what a damaged file says of its own sizes
            for data in batch.to_pylist():
                number += 1
                yield Raw(Where(str(file), number, "row"), data)
    except (ArrowException, OSError, ValueError, LookupError) as error:  # some of its errors are KeyErrors and IndexErrors
        got = (str(error).splitlines() or [""])[0][:80]
        problems.add(Where(str(file), number + 1, "row"), "", what, got or type(error).__name__, "data.bad-file")


def _read_text(file: Path, problems: Problems) -> Iterator[Raw]:
    """One document a block where blank lines separate blocks; one document a line in a file without blank lines."""
    blocks = any(not line.strip() for line in files.text_lines(file))
    block: list[str] = []
    for number, line in enumerate(files.text_lines(file), 1):
        if line.strip():
            block.append(line)
        if block and (not blocks or not line.strip()):
            yield Raw(Where(str(file), number - len(block) + (not blocks)), {"text": "\n".join(block)})
            block = []
    if block:
        yield Raw(Where(str(file), number + 1 - len(block)), {"text": "\n".join(block)})


def _read_document(file: Path, problems: Problems) -> Iterator[Raw]:
    text = "".join(files.text(file))
    if text.strip():
        yield Raw(Where(str(file), 1), {"text": text})
