"""The raw lines behind what is wrong, written to a file of their own for repair.

Why raw: a broken line is mended by eye, and the mended file is then a source like any other. What stands in an array, a table or a
Parquet file is written as one JSON object a line. Cost: one pass over the files that have such lines.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from halfbyte.data.config import SourceConfig
from halfbyte.data.problems import Problem, Problems
from halfbyte.data.sources import open_source
from halfbyte.errors import DataError

LINES = (".jsonl", ".ndjson")


def is_lines(file: str) -> bool:
    """Whether a file holds one JSON object a line."""
    return file.removesuffix(".gz").endswith(LINES)


def raw(file: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file of JSON lines, as they are."""
    path = Path(file)
    with cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb") as stream:
        yield from enumerate(stream, 1)


def write(problems: Iterable[Problem], sources: Iterable[SourceConfig], cache: Path, out: Path) -> tuple[int, int]:
    """Writes the lines that `problems` name to `out`; returns how many, and how many cannot be had (syntax errors in an array).

    Raises DataError (data.exists) where `out` exists.
    """
    wanted: dict[str, set[int]] = {}
    for problem in problems:
        wanted.setdefault(problem.where.file, set()).add(problem.where.line)
    missing = sum(map(len, wanted.values()))
    written = 0
    with create(out) as stream:
        for file in [f for f in wanted if is_lines(f)]:
            for number, line in raw(file):
                if number in wanted[file]:
                    stream.write(line.rstrip(b"\r\n") + b"\n")
                    written += 1
        for source in sources if any(not is_lines(f) for f in wanted) else ():
            for record in open_source(source, cache).read(Problems()):
                if not is_lines(record.where.file) and record.where.line in wanted.get(record.where.file, ()):
                    stream.write(json.dumps(record.data, ensure_ascii=False, default=str).encode() + b"\n")
                    written += 1
    return written, missing - written


def create(out: Path) -> IO[bytes]:
    """A new file. Raises DataError (data.exists) where there is one: nothing is ever overwritten."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.open("xb")
    except FileExistsError:
        raise DataError(f"`{out}` exists already", hint="choose another name, or remove it", code="data.exists") from None
