"""From examples to token ids and a mask of the tokens to learn.

A conversation is tokenised whole, and the character spans of its answers are carried over by offsets. Where a token would
straddle the beginning of an answer (a header that ends in a newline, an answer that begins with one), the example is tokenised
piece by piece instead: that is what the model meets in use, where the prompt is tokenised alone. Every learned span is decoded
and compared with its text before it counts. Why: offsets of tokenizers have surprises, and a wrong mask is silent. Cost: about
a millisecond for an example of 200 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import masks
from halfbyte.data.problems import Problems, Where
from halfbyte.data.rendering import Renderer
from halfbyte.data.templates import Template, adds_bos
from halfbyte.data.turns import Example, Message
from halfbyte.errors import DataError

BATCH = 256  # examples tokenised in one call

Ids = NDArray[np.uint32]
Ids64 = NDArray[np.int64]
Mask = NDArray[np.bool_]
Span = masks.Span


class Encoded(NamedTuple):
    """One example as tokens: ids uint32 [n], trained bool [n] (the token is one to learn).

    weights: float32 [n], of each token in the loss, or None where all that is learned weighs 1. group: see `Example`.
    """

    where: Where
    ids: Ids
    trained: Mask
    weights: NDArray[np.float32] | None = None
    group: str = ""


class _Text(NamedTuple):
    where: Where
    text: str
    spans: list[Span] | None  # None: all is learned
    framed: bool  # plain text: bos before it, eos after it
    weights: tuple[float, ...]  # of each span, or of all
    group: str


@dataclass(frozen=True)
class Options:
    """What decides the tokens, besides the examples, the tokenizer and the template: part of the cache key."""

    system: str | None
    loss_on: str | Sequence[str]  # roles, or assistant, last, each, all


class Encoder:
    """Encodes examples for one tokenizer and one template."""

    def __init__(self, tokenizer: Any, template: Template, options: Options) -> None:
        if not tokenizer.is_fast:
            hint = "load the tokenizer from its tokenizer.json"
            raise DataError(
                "this tokenizer cannot say which characters a token stands for (it is not a fast one)", hint=hint, code="data.mask"
            )
        self._tokenizer = tokenizer
        self._renderer = Renderer(template, tokenizer)
        self._options = options
        self._masker: masks.Masker | None = None
        self._bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        specials = [re.escape(token) for token in tokenizer.all_special_tokens if token]
        self._special = re.compile("|".join(specials) or "(?!)")

    @property
    def masker(self) -> masks.Masker:
        """Finds what is learned; made at the first conversation, since plain text needs no template."""
        if self._masker is None:
            self._masker = masks.Masker(self._renderer, self._tokenizer)
        return self._masker

    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, if a conversation was encoded."""
        return (
            () if self._masker is None else tuple(dict.fromkeys(i for end in self._masker.marks.ends for i in self._ids(end)[-1:]))
        )

    def encode(self, examples: Iterable[Example], problems: Problems) -> Iterator[Encoded]:
        """Encodes examples in order; what cannot be encoded is noted in `problems` and passed over."""
        stream = (part for example in examples for part in self._parts(example))
        while chunk := list(islice(stream, BATCH)):
            texts = [text for example in chunk if (text := self._text(example, problems)) is not None]
            if texts:
                yield from self._tokenise(texts, problems)

    def _parts(self, example: Example) -> list[Example]:
        """With `loss_on: each`, one example an answer, which ends there; they stay on one side of the split."""
        if self._options.loss_on != "each" or not example.messages:
            return [example]
        group = example.group or str(example.where)
        cuts = masks.chosen(example, "each")
        return [replace(example, messages=example.messages[: i + 1], learn_from=i, group=group) for i in cuts]

    def _text(self, example: Example, problems: Problems) -> _Text | None:
        learn = self._options.loss_on
        if not example.messages:
            text = example.prompt + example.text
            spans = None if not example.prompt or learn == "all" else [(len(example.prompt), len(text))]
            return _Text(example.where, text, spans, True, (example.weight,), example.group)
        if self._options.system is not None and example.messages[0].role != "system":
            added = (Message("system", self._options.system), *example.messages)
            example = replace(example, messages=added, learn_from=example.learn_from + (1 if example.learn_from else 0))
        if any(self._special.search(message.content) for message in example.messages):
            problems.noted["a message spells a special token, which is read as that token"] += 1
        if learn == "all" and any(message.weight != 1 for message in example.messages):
            problems.add(example.where, "messages", "no weights of messages with `loss_on: all`", "one")
            return None
        masker = self.masker
        try:
            text, learned = masker.spans(example, learn)
        except masks.Unsafe as error:
            problems.add(example.where, "messages", error.expected, error.got, error.code)
        except DataError as error:
            problems.add(example.where, "messages", "messages that the template takes", error.message, "data.template")
        else:
            if learned and learned[-1].prompted:
                what = f"the generation prompt ends in {learned[-1].prompted!r}, which the finished answer does not show"
                problems.noted[what] += 1
            if learned is None:
                return _Text(example.where, text, None, False, (example.weight,), example.group)
            weights = tuple(example.messages[span.message].weight * example.weight for span in learned)
            return _Text(example.where, text, [(s.start, s.stop) for s in learned], False, weights, example.group)
        return None

    def _tokenise(self, texts: list[_Text], problems: Problems) -> Iterator[Encoded]:
        found = self._tokenizer(
            [text.text for text in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=any(text.spans is not None for text in texts),
            verbose=False,
        )
        for number, text in enumerate(texts):
            ids: list[int] = found["input_ids"][number]
            owner = np.zeros(len(ids), dtype=np.int64)  # the span that a token belongs to, -1 for none
            if text.spans is not None:
                owner = _owner(np.asarray(found["offset_mapping"][number], dtype=np.int64).reshape(-1, 2), text.spans)
                if not self._proven(ids, owner, text):
                    ids, owner = self._piecewise(text)
                    if not self._proven(ids, owner, text):
                        expected = f"the learned tokens to spell {text.text[slice(*text.spans[0])][:60]!r}"
                        got = repr(self._decode(np.asarray(ids)[owner >= 0])[:60])
                        problems.add(text.where, "messages", expected, got, "data.mask")
                        continue
            if text.framed:
                ids = [*self._bos, *ids, *self._eos]
                owner = np.concatenate([np.full(len(self._bos), -1), owner, np.zeros(len(self._eos), dtype=np.int64)])
            yield Encoded(text.where, np.asarray(ids, dtype=np.uint32), owner >= 0, _weights(owner, text.weights), text.group)

    def _proven(self, ids: list[int], owner: Ids64, text: _Text) -> bool:
        """Whether the tokens of each span stand together and spell it."""
        assert text.spans is not None
        for number, span in enumerate(text.spans):
            mine = np.flatnonzero(owner == number)
            if not len(mine) or mine[-1] - mine[0] + 1 != len(mine):
                return False
            if not self._same(ids[mine[0] : mine[-1] + 1], text.text[slice(*span)]):
                return False
        return True

    def _same(self, ids: list[int], span: str) -> bool:
        # Some tokenizers lose a leading space or normalise text; then the span's own round trip is the measure.
        said = self._decode(ids)
        return said == span or said.removeprefix(" ") == self._decode(self._ids(span)).removeprefix(" ")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _decode(self, ids: Any) -> str:
        text: str = self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def _piecewise(self, text: _Text) -> tuple[list[int], Ids64]:
        assert text.spans is not None
        ids: list[int] = []
        owner: list[int] = []
        at = 0
        for number, (start, stop) in enumerate([*text.spans, (len(text.text), len(text.text))]):
            for piece, owned in ((text.text[at:start], -1), (text.text[start:stop], number)):
                new = self._ids(piece) if piece else []
                ids += new
                owner += [owned] * len(new)
            at = stop
        return ids, np.asarray(owner, dtype=np.int64)


def _weights(owner: Ids64, weights: tuple[float, ...]) -> NDArray[np.float32] | None:
    """The weight of each token in the loss, that of its span; None where all that is learned weighs 1."""
    if all(weight == 1 for weight in weights):
        return None
    return np.where(owner >= 0, np.asarray(weights, dtype=np.float32)[owner], np.float32(0))


def _owner(offsets: Ids64, spans: list[Span]) -> Ids64:
    """The span that each token lies wholly inside of, -1 for none. offsets [n, 2]; spans in their order."""
    if not spans:
        return np.full(len(offsets), -1, dtype=np.int64)
    starts, stops = np.asarray(spans, dtype=np.int64).T
    found = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    inside = (found >= 0) & (offsets[:, 1] <= stops[found]) & (offsets[:, 0] < stops[found])
    return np.where(inside, found, -1)
