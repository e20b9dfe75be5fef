"""Data files, found and opened: paths, directories, patterns; plain or compressed; and a digest that is not taken twice.

Why a remembered digest: the cache is named after the content of its files, and a gigabyte takes seconds to read. So the digest
of a file is kept with its size, inode and time of change, and believed while they stay the same; one that was changed less than
two seconds before it was read is read again, since the clock of a file system may not tell two changes apart. Cost: one pass
over the bytes, once.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import json
import lzma
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from halfbyte.cachefile import replacing
from halfbyte.data.problems import Where
from halfbyte.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt", ".md")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SAVED = {"dataset_info.json", "state.json", "dataset_dict.json"}  # what `datasets` writes beside its Arrow files
SETTLED = 2.0  # seconds a file must have been left alone before its time of change is believed
# What reading a damaged or cut-off compressed file raises; zstd comes through Arrow, whose errors are OSErrors.
BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error)


def kind_of_file(name: str) -> str:
    """The ending that says how a file is read, without that of its compression: `.jsonl` for `a.jsonl.gz`."""
    return Path(uncompressed(name)).suffix.lower()


def uncompressed(name: str) -> str:
    """A file name without the ending of its compression."""
    return next((name[: -len(suffix)] for suffix in COMPRESSED if name.lower().endswith(suffix)), name)


def stem(path: str) -> str:
    """How a source is called: the last part of its path without endings that is no wildcard (`chats` of `chats/**/*.jsonl`)."""
    for part in reversed(Path(path).parts):
        name = uncompressed(part)
        for suffix in SUFFIXES:
            name = name.removesuffix(suffix)
        if any(letter.isalnum() for letter in name):
            return name
    return path


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as one, not as the id of a Hub dataset."""
    marks = path.startswith((".", "/", "~")) or any(c in path for c in "*?[\\") or path.count("/") > 1
    return marks or kind_of_file(path) in SUFFIXES or path.lower().endswith(COMPRESSED)


def find(path: str) -> tuple[list[Path], tuple[str, ...]]:
    """The data files that a path, directory or pattern names, in a fixed order, and what was passed over."""
    expanded = Path(os.path.expanduser(path))  # os.path: Path raises for an unknown user, and for a name that no file can have
    if os.path.isfile(expanded):
        return [expanded], ()
    if os.path.isdir(expanded):
        found = sorted(p for p in expanded.rglob("*") if p.is_file() and not _hidden(p.relative_to(expanded)))
        files = [p for p in found if kind_of_file(p.name) in SUFFIXES and p.name not in SAVED]
        rest = [p.name for p in found if p not in set(files)]
        if not files:
            message = f"the directory `{path}` holds no data file"
            raise DataError(message, hint=f"known endings: {endings()}", code="data.not-found")
        return files, (f"{path}: {len(rest)} other files passed over ({', '.join(rest[:3])})",) if rest else ()
    return sorted(Path(p) for p in glob.glob(str(expanded), recursive=True) if Path(p).is_file()), ()


def endings() -> str:
    """The endings that are read, as an error shows them."""
    return f"{' '.join(SUFFIXES)} (also with {' '.join(COMPRESSED)})"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def digest(files: list[Path], cache_dir: Path) -> str:
    """Names the content of files and their names, whatever folder they are in."""
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.name}\0{file.stat().st_size}\0{_content(file, cache_dir)}\0".encode())
    return sha.hexdigest()


def _content(file: Path, cache_dir: Path) -> str:
    began, stat = time.time(), file.stat()
    identity = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    note = cache_dir / "digests" / f"{hashlib.sha256(str(file.resolve()).encode(errors='surrogateescape')).hexdigest()[:32]}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["file"] == identity:
            return str(known["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never noted, or damaged: it is read
    with file.open("rb") as stream:
        found = _hash(stream)
    if began - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        with replacing(note) as kept:
            kept.write(json.dumps({"file": identity, "digest": found}).encode())
    return found


def _hash(stream: IO[bytes]) -> str:
    sha = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        sha.update(chunk)
    return sha.hexdigest()


def open_bytes(file: Path) -> IO[bytes]:
    """The bytes of a file, decompressed as its ending says."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        return cast("IO[bytes]", pyarrow.input_stream(str(file), compression="zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("IO[bytes]", openers.get(suffix, open)(file, "rb"))


def chunks(file: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """The decompressed bytes in pieces. Raises `DataError` (`data.bad-file`) for a damaged file."""
    try:
        with open_bytes(file) as stream:
            while chunk := stream.read(size):
                yield chunk
    except BROKEN as error:
        raise broken(file, error) from error


def broken(file: Path, error: Exception) -> DataError:
    """What is said of a file whose bytes cannot be had."""
    what = (str(error).splitlines() or [type(error).__name__])[0][:100]
    hint = "the file is cut off, damaged, or not what its ending says"
    return DataError(f"`{file}` cannot be read: {what or type(error).__name__}", hint=hint, code="data.bad-file")


def lines(file: Path) -> Iterator[bytes]:
    """The lines of a file without their newline, bounded in memory by the longest one."""
    rest: list[bytes] = []
    for chunk in chunks(file):
        parts = chunk.split(b"\n")
        if len(parts) == 1:
            rest.append(chunk)
            continue
        yield b"".join([*rest, parts[0]])
        yield from parts[1:-1]
        rest = [parts[-1]] if parts[-1] else []
    if last := b"".join(rest):
        yield last


def text(file: Path) -> Iterator[str]:
    """The text of a file in pieces. Raises `DataError` (`data.bad-file`) with the line of a byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    for chunk in chunks(file):
        held = decoder.getstate()[0]
        try:
            part = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, line + (held + chunk).count(b"\n", 0, error.start), (held + chunk)[error.start]) from error
        line += part.count("\n")
        yield part
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(file, line, error.object[error.start]) from error


def text_lines(file: Path) -> Iterator[str]:
    """The lines of a text file without their newline; nothing after the last newline is a line of its own."""
    rest: list[str] = []
    for part in text(file):
        pieces = part.split("\n")
        if len(pieces) == 1:
            rest.append(part)
            continue
        yield "".join([*rest, pieces[0]])
        yield from pieces[1:-1]
        rest = [pieces[-1]] if pieces[-1] else []
    if last := "".join(rest):
        yield last


def _not_utf8(file: Path, line: int, byte: int) -> DataError:
    where = Where(str(file), line)
    return DataError(f"{where}: byte 0x{byte:02x} is not UTF-8 text", hint="save the file as UTF-8", code="data.bad-file")
