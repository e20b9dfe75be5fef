"""Two records, written in every kind of file that is read."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = [{"prompt": 'a, "b"\nc', "completion": "é 二"}, {"prompt": "{{name}}", "completion": "x"}]


def _csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def _parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def _arrow(path: Path, new: str) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with getattr(pyarrow.ipc, new)(str(path), table.schema) as writer:
        writer.write_table(table)


def _zst(path: Path) -> None:
    import pyarrow

    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write("\n".join(map(json.dumps, ROWS)).encode())


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8"),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "a.json": lambda p: p.write_text(json.dumps(ROWS, indent=2), encoding="utf-8"),
    "lines.json": lambda p: p.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8"),
    "bom.json": lambda p: p.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "bom.jsonl": lambda p: p.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig"),
    "a.csv": _csv,
    "a.tsv": lambda p: _csv(p, "\t"),
    "a.parquet": _parquet,
    "a.arrow": lambda p: _arrow(p, "new_stream"),
    "a.feather": lambda p: _arrow(p, "new_file"),
    "a.json.bz2": lambda p: p.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "a.jsonl.xz": lambda p: p.write_bytes(lzma.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "a.jsonl.zst": _zst,
}
