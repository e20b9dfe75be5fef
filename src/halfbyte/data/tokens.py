"""Tokens on disk, and the views of them that are trained on or held out.

One source is tokenised once into a folder of plain numpy files, named after everything that decided its content: the data, the
tokenizer, the template, the options. The arrays are memory-mapped, so a set of any size costs no RAM. The folder is written
under another name and renamed when whole: two runs that start at once both end with a good one. Cost: 5 bytes a token, 9 where
weights differ, and 48 an example, so that a second start need not read the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.convert import Block
from halfbyte.data.problems import Where

LAYOUT = 2  # raise it when the files change
SMALL = {"lines": np.int64, "files": np.int64, "learned": np.int64, "marks": np.uint64}  # one number an example
PARTS = {"ids": np.uint32, "trained": np.bool_, "weights": np.float32}  # one a token
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """One tokenised source. Example i is `ids[offsets[i]:offsets[i+1]]`.

    ids uint32 [n], trained bool [n], weights float32 [n] or None for all 1 (memory-mapped); offsets int64 [E+1]; lines, files
    (into `file_names`), learned (tokens to learn behind the first): int64 [E]; marks uint64 [E], equal within a group.
    """

    name: str
    shape: str
    ids: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    weights: NDArray[np.float32] | None
    offsets: Int
    lines: Int
    files: Int
    learned: Int
    marks: NDArray[np.uint64]
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

    def count(self, example: Int, start: Int, stop: Int) -> Int:
        """Tokens to learn in each piece `start[i]:stop[i]` of an example, its first token left out: int64.

        Whole examples are counted already; other pieces are read one by one, so that no array of the whole set is made.
        """
        counts = self.learned[example]
        trained = np.asarray(self.trained)  # a plain view: slicing it is ten times cheaper than slicing a memmap
        for i in np.flatnonzero((start != self.offsets[example]) | (stop != self.offsets[example + 1])).tolist():
            counts[i] = np.count_nonzero(trained[start[i] + 1 : stop[i]])
        return counts


def windows(array: NDArray[Any], size: int = 1 << 23) -> Iterator[tuple[int, NDArray[Any]]]:
    """Parts of an array with their places, each with one number of the next part at its end.

    Each part of a memory-mapped array has a map of its own, which goes with it: read through one map, all of a file would end up
    counted as memory of this process.
    """
    for at in range(0, len(array), size):
        count = min(size + 1, len(array) - at)
        if isinstance(array, np.memmap) and array.filename is not None:
            place = array.offset + at * array.itemsize
            yield at, np.asarray(np.memmap(array.filename, dtype=array.dtype, mode="r", offset=place, shape=(count,)))
        else:
            yield at, array[at : at + count]


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
    arrays["weights"] = np.load(folder / "weights.npy", mmap_mode="r") if meta["weighted"] else None
    small = {part: np.load(folder / f"{part}.npy") for part in ("offsets", *SMALL)}
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
    """Collects blocks and writes the folder. What there is of every token goes to disk as it comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._partial = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
        self._partial.mkdir(parents=True)
        self._lengths: list[Int] = []
        self._small: dict[str, list[NDArray[Any]]] = {part: [] for part in SMALL}
        self._names: dict[str, int] = {}
        self._unit = "line"
        self._weighted = False
        self._tokens = 0
        self._open: dict[str, BinaryIO] = {}

    def write(self, block: Block) -> None:
        """Appends the examples of a block."""
        numbers = np.asarray([self._names.setdefault(name, len(self._names)) for name in block.names], dtype=np.int64)
        for part, values in (
            ("lines", block.lines),
            ("files", numbers[block.files]),
            ("learned", block.learned),
            ("marks", block.marks),
        ):
            self._small[part].append(values)
        self._lengths.append(block.lengths)
        self._unit = block.unit
        weights = block.weights
        if weights is not None and not self._weighted:
            self._weighted = True
            for at in range(0, self._tokens, 1 << 20):  # what came before weighs 1
                self._append("weights", np.ones(min(1 << 20, self._tokens - at), dtype=np.float32))
        if self._weighted:
            self._append("weights", np.ones(len(block.ids), dtype=np.float32) if weights is None else weights)
        self._append("ids", block.ids)
        self._append("trained", block.trained)
        self._tokens += len(block.ids)

    def _append(self, part: str, values: NDArray[Any]) -> None:
        if part not in self._open:
            self._open[part] = (self._partial / f"{part}.npy").open("wb")
            self._open[part].write(_header(part, 0))
        self._open[part].write(values.data)

    def close(self, shape: str, end: Iterable[int], notes: Iterable[str]) -> None:
        """Says how long the arrays have become, and puts the folder in its place."""
        for part, stream in self._open.items():
            stream.seek(0)
            stream.write(_header(part, self._tokens))
            stream.close()
        lengths = np.concatenate([np.zeros(0, dtype=np.int64), *self._lengths])
        np.save(self._partial / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        for part, small in SMALL.items():
            np.save(self._partial / f"{part}.npy", np.concatenate([np.zeros(0, dtype=small), *self._small[part]]).astype(small))
        meta = {
            "shape": shape, "file_names": list(self._names), "unit": self._unit, "end": list(end), "notes": list(notes),
            "weighted": self._weighted,
        }  # fmt: skip
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
        for stream in self._open.values():
            stream.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def _header(part: str, count: int) -> bytes:
    """What a numpy file of so many numbers begins with: always of one length, so that it can be written before they are counted."""
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(PARTS[part])), "fortran_order": False, "shape": (count,)}
    text = str(described).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@dataclass(frozen=True)
class TokenSet:
    """What is trained on, or held out: pieces of tokenised sources, each at most a row long unless it is text to be cut.

    source, example, start, stop: int64 [P]; `ids[start:stop]` of the source is the piece, `example` its number in the source.
    weights: how often an epoch visits each source. cache: the folder where packings are kept, if they are.
    """

    sources: tuple[Tokens, ...]
    weights: tuple[float, ...]
    source: Int
    example: Int
    start: Int
    stop: Int
    pad_id: int
    cache: Path | None = None

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
            counts[mine] = source.count(self.example[mine], self.start[mine], self.stop[mine])
        return counts

    @property
    def weighted(self) -> bool:
        """Whether the tokens of any source weigh differently in the loss."""
        return any(source.weights is not None for source in self.sources)

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
