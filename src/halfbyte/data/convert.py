"""From records to blocks of tokens: what every process that prepares data does with the records it is given.

Why blocks: a process hands over a few arrays for hundreds of examples, so that whoever writes them touches no example. Nothing
here imports torch: a process that only tokenises stays small. Cost: the tokenizer's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import shapes
from halfbyte.data.encode import Encoded, Encoder, Options
from halfbyte.data.problems import Problems
from halfbyte.data.sources import Raw, Record, parse
from halfbyte.data.templates import Template

Int = NDArray[np.int64]


class Block(NamedTuple):
    """Examples in a row. ids uint32 [n], trained bool [n], weights float32 [n] (of trained tokens) or None (all 1).

    lengths, lines, files (into `names`), learned (tokens to learn behind the first): int64 [e]; marks: uint64 [e], equal for
    examples of one group, and for equal tokens where no group is named.
    """

    ids: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    weights: NDArray[np.float32] | None
    lengths: Int
    lines: Int
    files: Int
    learned: Int
    marks: NDArray[np.uint64]
    names: tuple[str, ...]
    unit: str


class Result(NamedTuple):
    """What became of some records: their tokens (None: nothing), what is wrong with them, and how many were examples at all."""

    block: Block | None
    problems: Problems
    examples: int
    end: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """All that a process needs in order to convert records of one source. first: its first record, which shows the columns.

    quick: see `Engine`.
    """

    tokenizer: Any
    template: Template
    options: Options
    shape: str
    layout: shapes.Layout
    first: Record
    quick: bool = False


class Converter:
    """Converts records of one source, some at a time."""

    def __init__(self, job: Job, encoder: Encoder | None = None) -> None:
        self.reader = shapes.reader(job.shape, job.first, job.layout)
        self._encoder = encoder or Encoder(job.tokenizer, job.template, job.options, job.quick)

    def __call__(self, raws: Sequence[Raw], limit: int | None = None) -> Result:
        """Tokens of the examples in `raws`, of the first `limit` of them where it is given."""
        problems = Problems()
        records = (record for raw in raws if (record := parse(raw, problems)) is not None)
        read = (e for record in records if (e := self.reader.read(record, problems)) is not None)
        examples = list(islice(read, limit))
        encoded = list(self._encoder.encode(examples, problems))
        return Result(_block(encoded) if encoded else None, problems, len(examples), self._encoder.end_ids())


def _block(encoded: list[Encoded]) -> Block:
    names: dict[str, int] = {}
    weights = None
    if any(e.weights is not None for e in encoded):
        weights = np.concatenate([np.ones(len(e.ids), np.float32) if e.weights is None else e.weights for e in encoded])
    return Block(
        np.concatenate([e.ids for e in encoded]),
        np.concatenate([e.trained for e in encoded]),
        weights,
        np.asarray([len(e.ids) for e in encoded], dtype=np.int64),
        np.asarray([e.where.line for e in encoded], dtype=np.int64),
        np.asarray([names.setdefault(e.where.file, len(names)) for e in encoded], dtype=np.int64),
        np.asarray([np.count_nonzero(e.trained[1:]) for e in encoded], dtype=np.int64),
        np.asarray([_mark(e) for e in encoded], dtype=np.uint64),
        tuple(names),
        encoded[-1].where.unit,
    )


def _mark(encoded: Encoded) -> int:
    content = encoded.group.encode(errors="surrogatepass") if encoded.group else encoded.ids.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, person=b"group" if encoded.group else b"ids").digest(), "little")
