"""Tokens of a text, and which of them spell the spans that are learned: proven for every span, or not given.

A text is tokenised whole. Where tokens stand for bytes, each has a length, and a span is where their sum says, once all of them
together spell the text; of other tokenizers, and where a text was normalised, the tokens of a span are looked for by its
characters. Where a token would straddle the beginning of a span (a header that ends in a newline, an answer that begins with one),
the text is tokenised piece by piece instead: that is what the model meets in use, where the prompt is tokenised alone. Whatever was
found must stand together and spell the span before it counts, since offsets of tokenizers have surprises. Cost: about 15
microseconds a text of 1,000 characters, and the tokenizer's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.engine import Engine

Span = tuple[int, int]
Run = tuple[int, int]
Ids = NDArray[np.uint32]
Int = NDArray[np.int64]


# GPT-2's alphabet: bytes that print stand for themselves, the others for characters from 256 on, in their order.
PLAIN = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
ODD = [byte for byte in range(256) if byte not in PLAIN]
ALPHABET = {256 + n: byte for n, byte in enumerate(ODD)} | dict.fromkeys(ODD, 0x10FFFF)
BYTE = re.compile("<0x([0-9A-F]{2})>")


class Aligned(NamedTuple):
    """Ids of a text, uint32 [n]; `runs`: of each span, its first token and the one behind its last; None: they cannot be told."""

    ids: Ids
    runs: list[Run] | None


class Aligner:
    """Tokenises texts for one tokenizer; quick: see `Engine`."""

    def __init__(self, tokenizer: Any, quick: bool = False) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._engine = Engine(tokenizer, quick and self._bytes is not None)

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        return _table(self._backend)

    @cached_property
    def _spellings(self) -> tuple[NDArray[np.object_], Int]:
        """The bytes of every token, and how many they are; of byte-level tokenizers."""
        table = np.empty(len(self._bytes or ()), dtype=np.object_)
        table[:] = self._bytes or []
        return table, np.fromiter(map(len, table), dtype=np.int64, count=len(table))

    def __call__(self, texts: Sequence[str], spans: Sequence[Sequence[Span] | None]) -> list[Aligned]:
        """The tokens of each text; where it has spans, with the run of tokens that spells each of them."""
        if self._bytes is None:
            found = self._engine.encodings(texts)
            return [self._aligned(e, *of) for e, of in zip(found, zip(texts, spans, strict=True), strict=True)]
        ids, bounds = self._engine(texts)
        table, widths = self._spellings
        raw = [text.encode() for text in texts]
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths[ids])])
        starts = np.cumsum([0, *map(len, raw)], dtype=np.int64)
        same = np.ones(len(texts), dtype=np.bool_)
        if not np.array_equal(ends[bounds], starts) or b"".join(table[ids].tolist()) != b"".join(raw):
            same[:] = [b"".join(table[ids[bounds[i] : bounds[i + 1]]].tolist()) == text for i, text in enumerate(raw)]
        # Where spans begin and end, in bytes of all tokens; a token ends just there, or one straddles the edge.
        edges = np.asarray(
            [ends[bounds[i]] + edge for i, (text, of) in enumerate(zip(texts, spans, strict=True)) for edge in _edges(text, of)],
            dtype=np.int64,
        )
        tokens = np.searchsorted(ends, edges)
        met = (ends[np.minimum(tokens, len(ends) - 1)] == edges).tolist()
        each = iter(zip(tokens.tolist(), met, strict=True))
        result: list[Aligned] = []
        for i, (text, of) in enumerate(zip(texts, spans, strict=True)):
            first, last = int(bounds[i]), int(bounds[i + 1])
            places = [next(each) for _ in range(2 * len(of or ()))]
            if not same[i]:  # it was normalised
                result.append(self._aligned(self._engine.encodings([text])[0], text, of))
            elif all(good for _, good in places):
                result.append(Aligned(ids[first:last], [(a - first, b - first) for (a, _), (b, _) in _pairs(places)]))
            else:
                assert of is not None
                result.append(self._cut(text, of))
        return result

    def ids(self, text: str) -> list[int]:
        """The tokens of one text, without special tokens that were not written in it."""
        return list(self._engine.encodings([text])[0].ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def _aligned(self, encoding: Any, text: str, spans: Sequence[Span] | None) -> Aligned:
        ids: list[int] = encoding.ids
        if spans is None:
            return Aligned(np.asarray(ids, dtype=np.uint32), [])
        for find in (self._by_ends, self._by_offsets):
            runs = find(encoding, spans)
            if runs is not None and self._spelled(ids, runs, text, spans):
                return Aligned(np.asarray(ids, dtype=np.uint32), runs)
        return self._cut(text, spans)

    def _cut(self, text: str, spans: Sequence[Span]) -> Aligned:
        ids, runs = self._piecewise(text, spans)
        return Aligned(np.asarray(ids, dtype=np.uint32), runs if self._spelled(ids, runs, text, spans) else None)

    def _by_ends(self, encoding: Any, spans: Sequence[Span]) -> list[Run] | None:
        """By the tokens of the first and the last character of each span: enough where they begin and end just there."""
        runs: list[Run] = []
        for start, stop in spans:
            first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
            if first is None or last is None:
                return None
            runs.append((first, last + 1))
        return runs

    def _by_offsets(self, encoding: Any, spans: Sequence[Span]) -> list[Run] | None:
        """By the offsets of all tokens: those wholly inside a span, in an unbroken run."""
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        runs: list[Run] = []
        for start, stop in spans:
            mine = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 0] < stop))
            if not len(mine) or mine[-1] - mine[0] + 1 != len(mine):
                return None
            runs.append((int(mine[0]), int(mine[-1]) + 1))
        return runs

    def _piecewise(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Run]]:
        ids: list[int] = []
        runs: list[Run] = []
        at = 0
        for start, stop in spans:
            ids += self.ids(text[at:start])
            first = len(ids)
            ids += self.ids(text[start:stop])
            runs.append((first, len(ids)))
            at = stop
        return ids + self.ids(text[at:]), runs

    def _spelled(self, ids: list[int], runs: Sequence[Run], text: str, spans: Sequence[Span]) -> bool:
        """Whether runs follow each other and each spells its span."""
        at = 0
        for (first, last), (start, stop) in zip(runs, spans, strict=True):
            if first < at or not self._same(ids[first:last], text[start:stop]):
                return False
            at = last
        return True

    def _same(self, ids: list[int], span: str) -> bool:
        if self._bytes is not None and b"".join(map(self._bytes.__getitem__, ids)) == span.encode("utf-8", "surrogatepass"):
            return True
        # Some tokenizers normalise text, and some lose a leading space: then the span's own round trip is the measure.
        said, alone = self.decode(ids), self.decode(self.ids(span))
        if self._bytes is not None:
            return said == alone
        return said == span or said.removeprefix(" ") == alone.removeprefix(" ")


def _edges(text: str, spans: Sequence[Span] | None) -> list[int]:
    """The edges of spans in bytes, in their order."""
    if not spans:
        return []
    edges = [edge for span in spans for edge in span]
    if text.isascii():
        return edges
    return list(accumulate(len(text[a:b].encode()) for a, b in zip([0, *edges], edges, strict=False)))


def _pairs(places: list[tuple[int, bool]]) -> Iterator[tuple[tuple[int, bool], tuple[int, bool]]]:
    return zip(places[::2], places[1::2], strict=True)


def _table(backend: Any) -> list[bytes] | None:
    """The bytes of every token, by its id, for byte-level tokenizers and for those that write a space as `\u2581`; else None."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if decoder.get("type") == "ByteLevel":
        return _filled(vocabulary, _byte_level)
    parts = decoder.get("decoders", [])
    kinds = [part["type"] for part in parts]
    if kinds == ["Replace", "ByteFallback", "Fuse"] and (parts[0]["pattern"], parts[0]["content"]) == ({"String": "\u2581"}, " "):
        return _filled(vocabulary, _spaced)
    return None


def _filled(vocabulary: dict[str, int], spell: Callable[[str], bytes]) -> list[bytes]:
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        table[number] = spell(token)
    return table


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(ALPHABET).encode("latin-1")
    except UnicodeEncodeError:  # an added token, which stands for its own characters
        return token.encode()


def _spaced(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()
