"""Tokens on disk, and the views of them that are trained on or held out.

One source is tokenised once into a folder of plain numpy files, named after everything that decided its content: the data, the
tokenizer, the template, the options. The arrays are memory-mapped, so a set of any size costs no RAM. The folder is written
under another name and renamed when whole: two runs that start at once both end with a good one. Cost: 5 bytes a token.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encode import Encoded
from halfbyte.data.problems import Where

LAYOUT = 1  # raise it when the files change
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """One tokenised source. Example i is `ids[offsets[i]:offsets[i+1]]`.

    ids uint32 [n], trained bool [n] (memory-mapped); offsets int64 [E+1]; lines int64 [E], files int64 [E] (into `file_names`).
    """

    name: str
    shape: str
    ids: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    offsets: Int
    lines: Int
    files: Int
    file_names: tuple[str, ...]
    unit: str
    end: tuple[int, ...]
    notes: tuple[str, ...]
    key: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def where(self, example: int) -> str:
        """`chats.jsonl:12` for an example."""
        return str(Where(self.file_names[self.files[example]], int(self.lines[example]), self.unit))

    def count(self, start: Int, stop: Int) -> Int:
        """Tokens to learn in each span `start[i]:stop[i]`, int64, read span by span: no array of the whole set is made."""
        trained = np.asarray(self.trained)  # a plain view: slicing it is ten times cheaper than slicing a memmap
        spans = zip(start.tolist(), stop.tolist(), strict=True)
        return np.fromiter((np.count_nonzero(trained[a:b]) for a, b in spans), dtype=np.int64, count=len(start))


def key_of(parts: dict[str, Any]) -> str:
    """The name of a cache folder: a digest of everything that decides its content."""
    return hashlib.sha256(json.dumps([LAYOUT, parts], sort_keys=True).encode()).hexdigest()[:32]


def load(folder: Path, name: str) -> Tokens | None:
    """Maps a folder written by `Writer`; None where there is none, or a damaged one, which is removed to be written again."""
    if not folder.exists():
        return None
    try:
        tokens = _map(folder, name)
    except (OSError, ValueError, KeyError, EOFError):
        tokens = None
    if tokens is None or not len(tokens.ids) == len(tokens.trained) == tokens.offsets[-1]:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return tokens


def _map(folder: Path, name: str) -> Tokens:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("ids", "trained")}
    small = {part: np.load(folder / f"{part}.npy") for part in ("offsets", "lines", "files")}
    return Tokens(
        name=name,
        shape=meta["shape"],
        **arrays,
        **small,
        file_names=tuple(meta["file_names"]),
        unit=meta["unit"],
        end=tuple(meta["end"]),
        notes=tuple(meta["notes"]),
        key=folder.name,
    )


class Writer:
    """Collects encoded examples and writes the folder. Ids and masks go to disk as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._partial = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
        self._partial.mkdir(parents=True)
        self._lengths: list[int] = []
        self._lines: list[int] = []
        self._files: list[int] = []
        self._names: dict[str, int] = {}
        self._unit = "line"

    def write(self, examples: Iterable[Encoded]) -> int:
        """Appends examples; returns how many there are now."""
        with (self._partial / "ids.raw").open("ab") as ids, (self._partial / "trained.raw").open("ab") as trained:
            for example in examples:
                ids.write(example.ids.tobytes())
                trained.write(example.trained.tobytes())
                self._lengths.append(len(example.ids))
                self._lines.append(example.where.line)
                self._files.append(self._names.setdefault(example.where.file, len(self._names)))
                self._unit = example.where.unit
        return len(self._lengths)

    def close(self, shape: str, end: Iterable[int], notes: Iterable[str]) -> None:
        """Turns the raw files into arrays and puts the folder in its place."""
        for part, dtype in (("ids", np.uint32), ("trained", np.bool_)):
            raw = self._partial / f"{part}.raw"
            np.save(self._partial / f"{part}.npy", np.memmap(raw, dtype=dtype, mode="r"))
            raw.unlink()
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        for part, values in (("offsets", offsets), ("lines", self._lines), ("files", self._files)):
            np.save(self._partial / f"{part}.npy", np.asarray(values, dtype=np.int64))
        meta = {"shape": shape, "file_names": list(self._names), "unit": self._unit, "end": list(end), "notes": list(notes)}
        (self._partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        try:
            self._partial.rename(self._folder)
        except OSError:
            # Another run was first; its folder has the same content.
            if not (self._folder / "meta.json").exists():
                raise
            self.discard()

    def discard(self) -> None:
        """Removes what was written so far."""
        shutil.rmtree(self._partial, ignore_errors=True)


@dataclass(frozen=True)
class TokenSet:
    """What is trained on, or held out: pieces of tokenised sources, each at most a row long unless it is text to be cut.

    source, example, start, stop: int64 [P]; `ids[start:stop]` of the source is the piece, `example` its number in the source.
    """

    sources: tuple[Tokens, ...]
    weights: tuple[float, ...]
    source: Int
    example: Int
    start: Int
    stop: Int
    pad_id: int

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> Int:
        """Tokens of each piece, int64 [P]."""
        return self.stop - self.start

    @property
    def cut(self) -> NDArray[np.bool_]:
        """Pieces that packing may cut anywhere: plain text. bool [P]."""
        return np.asarray([s.shape == "text" for s in self.sources], dtype=np.bool_)[self.source]

    @property
    def example_ids(self) -> Int:
        """A number for every example over all sources, int64 [P]; `where` tells where it came from."""
        bases = np.cumsum([0, *(len(s) for s in self.sources)], dtype=np.int64)
        return np.asarray(bases[self.source] + self.example, dtype=np.int64)

    def where(self, example_id: int) -> str:
        """The file and line of an example, from its number."""
        for source in self.sources:
            if example_id < len(source):
                return source.where(example_id)
            example_id -= len(source)
        raise IndexError("no such example")

    def tokens(self) -> int:
        """Tokens in all pieces."""
        return int(self.lengths.sum())

    def trained(self) -> int:
        """Tokens to learn in all pieces; a piece's first token has nothing before it and does not count."""
        return int(self.trained_each().sum())

    def trained_each(self) -> Int:
        """Tokens to learn, for each piece, int64 [P]."""
        counts = np.zeros(len(self), dtype=np.int64)
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(self.source == number)
            counts[mine] = source.count(self.start[mine] + 1, self.stop[mine])
        return counts

    def take(self, keep: NDArray[Any]) -> TokenSet:
        """The same set with some pieces only (indices or a mask)."""
        return replace(self, **{name: getattr(self, name)[keep] for name in ("source", "example", "start", "stop")})

    @property
    def digest(self) -> str:
        """Names the content and its selection: two sets with the same digest give the same rows."""
        sha = hashlib.sha256(json.dumps([[s.key for s in self.sources], self.weights, self.pad_id]).encode())
        for part in (self.source, self.example, self.start, self.stop):
            sha.update(part.tobytes())
        return sha.hexdigest()
