"""Texts to token ids, many at a time: by fastokens where it says what the tokenizer itself says, else by the tokenizer.

Why two: tokenising was most of what preparing data costs, and fastokens, in Rust, does it twenty to forty times faster. Why they
are compared: the tokenizer's own library is the truth, and a token that differs leaves a normal loss curve. Compared are every
special token in its surroundings and all of ASCII when an engine is made; every other character that the data holds, between
letters, digits, spaces and line breaks, when it first comes; and one text in 64. A text with a character on which they differ goes
to the tokenizer. Where a text differs for any other reason, the whole source does: `prepare` starts over without fastokens and
says so. What is compared depends on the data alone, never on the number of processes. Cost: a twentieth of the tokenizer's time,
most of it for the comparisons; half a second and 80 MB to start.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import DataError

DISAGREES = "engine"
EVERY = 64  # texts of which one is compared
SPECIALS = 4096  # added tokens that are compared, the first ones
PROBE = (
    "It's  5 o'clock,\n\n  they'LL say: \"x_y = 10**3;\"\t\u00bfqu\u00e9?\r\n \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\U0001f44d\U0001f3fd e\u0301 "
)

Ids = NDArray[np.uint32]
Bounds = NDArray[np.int64]


class Engine:
    """Tokenises for one tokenizer. quick: with fastokens, if it can stand in for this tokenizer."""

    def __init__(self, tokenizer: Any, quick: bool) -> None:
        self.backend = tokenizer.backend_tokenizer
        self._plain()
        settings = json.loads(self.backend.to_str()) if quick else {}
        self._normalizes = bool(settings.get("normalizer"))
        self._quick = _fastokens(self.backend, settings) if quick else None
        self._known: set[str] = set()  # characters that were compared
        self._odd: set[str] = set()  # those of them that are not tokenised alike
        if self._quick is not None:
            added = [token["content"] for token in settings["added_tokens"]][:SPECIALS]
            surroundings = [PROBE, *(f"a{t}1 {t} {t}{t}\n{t}\n\n {t}B, {t}'s" for t in added)]
            if all(self._alike(surroundings)):
                self._meet(map(chr, range(128)))
            else:
                self._quick = None

    @property
    def quick(self) -> bool:
        """Whether fastokens does the work."""
        return self._quick is not None

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Bounds]:
        """The tokens of all texts in one array, uint32 [n], and where those of each begin and end in it, int64 [texts + 1].

        Special tokens are those written in a text; none are added. Raises `DataError` (`engine`) where fastokens differs.
        """
        if self._quick is None:
            return _flat(self._exact(texts))
        self._meet(set("".join(text for text in texts if not text.isascii())))
        mine = [not odd for odd in self._are_odd(texts)]
        ids, bounds = self._fast([text for text, good in zip(texts, mine, strict=True) if good])
        compared = [text for text, good in zip(texts, mine, strict=True) if good][::EVERY]
        for i, truth in enumerate(self._exact(compared)):
            if ids[bounds[i * EVERY] : bounds[i * EVERY + 1]].tolist() != truth:
                raise DataError("fastokens and the tokenizer give different tokens", hint="", code=DISAGREES)
        if all(mine):
            return ids, bounds
        quick = iter([ids[a:b] for a, b in pairwise(bounds.tolist())])
        exact = iter(self._exact([text for text, good in zip(texts, mine, strict=True) if not good]))
        each = [next(quick) if good else np.asarray(next(exact), dtype=np.uint32) for good in mine]
        return np.concatenate(each), np.cumsum([0, *map(len, each)], dtype=np.int64)

    def encodings(self, texts: Sequence[str]) -> list[Any]:
        """What the tokenizer itself says of each text, with the characters that its tokens stand for."""
        self._plain()
        return list(self.backend.encode_batch(list(texts), add_special_tokens=False))

    def _plain(self) -> None:
        # A tokenizer's file, or whoever used it before, may have asked for either.
        self.backend.no_truncation()
        self.backend.no_padding()

    def _exact(self, texts: Sequence[str]) -> list[list[int]]:
        self._plain()
        return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)] if texts else []

    def _fast(self, texts: Sequence[str]) -> tuple[Ids, Bounds]:
        assert self._quick is not None
        ids, bounds = self._quick.encode_batch_flat(list(texts))
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(bounds, dtype="<u8").astype(np.int64)

    def _alike(self, texts: Sequence[str]) -> list[bool]:
        """Whether both tokenise each text alike."""
        try:
            ids, bounds = self._fast(texts)
        except ValueError:  # a byte that the vocabulary lacks: the tokenizer passes over it
            return [False] if len(texts) == 1 else [self._alike([text])[0] for text in texts]
        return [ids[bounds[i] : bounds[i + 1]].tolist() == truth for i, truth in enumerate(self._exact(texts))]

    def _meet(self, characters: Iterable[str]) -> None:
        """Compares characters that were not met before, each in surroundings of every kind."""
        new = sorted(set(characters) - self._known)
        if new:
            alike = self._alike([f"a{c}1{c}{c}B {c}.{c}\n{c} {c}'{c}s  {c}" for c in new])
            self._known.update(new)
            self._odd.update(c for c, same in zip(new, alike, strict=True) if not same)

    def _are_odd(self, texts: Sequence[str]) -> list[bool]:
        """Whether a text is the tokenizer's own: it has a character that is not tokenised alike, or would be normalised."""
        whole = "".join(texts)
        here = [c for c in self._odd if c in whole]
        if not here and (not self._normalizes or unicodedata.is_normalized("NFC", whole)):
            return [False] * len(texts)
        normal = not self._normalizes
        return [any(c in text for c in here) or not (normal or unicodedata.is_normalized("NFC", text)) for text in texts]


def _flat(each: Sequence[Sequence[int]]) -> tuple[Ids, Bounds]:
    bounds = np.cumsum([0, *map(len, each)], dtype=np.int64)
    return np.fromiter((i for ids in each for i in ids), dtype=np.uint32, count=int(bounds[-1])), bounds


def _fastokens(backend: Any, settings: dict[str, Any]) -> Any:
    """fastokens for a tokenizer; None where it does not know its kind."""
    if settings["model"].get("type") != "BPE" or settings["model"].get("dropout"):
        return None
    from fastokens import Tokenizer

    try:
        return Tokenizer.from_json_str(backend.to_str())
    except (ValueError, RuntimeError):  # a part that it does not have
        return None
