"""From examples to token ids and a mask of the tokens to learn.

A conversation is tokenised whole, and the character spans of its answers are carried over by offsets. Where a token would
straddle the beginning of an answer (a header that ends in a newline, an answer that begins with one), the example is tokenised
piece by piece instead: that is what the model meets in use, where the prompt is tokenised alone. Every learned span is decoded
and compared with its text before it counts. Why: offsets of tokenizers have surprises, and a wrong mask is silent. Cost: about
a millisecond for an example of 200 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import masks
from halfbyte.data.problems import Problems, Where
from halfbyte.data.templates import Renderer, Template, adds_bos
from halfbyte.data.turns import Example, Message
from halfbyte.errors import DataError

BATCH = 256  # examples tokenised in one call

Ids = NDArray[np.uint32]
Mask = NDArray[np.bool_]


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
    spans: list[masks.Span] | None  # None: all is learned
    framed: bool  # plain text: bos before it, eos after it
    weights: tuple[float, ...]  # of each span, or of all
    group: str


@dataclass(frozen=True)
class Options:
    """What decides the tokens, besides the examples, the tokenizer and the template: part of the cache key."""

    system: str | None
    loss_on: str


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
        self._marks: masks.Marks | None = None
        self._bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        specials = [re.escape(token) for token in tokenizer.all_special_tokens if token]
        self._special = re.compile("|".join(specials) or "(?!)")

    @property
    def marks(self) -> masks.Marks:
        """What the template writes around an answer; probed at the first conversation, since plain text needs no template."""
        if self._marks is None:
            self._marks = masks.marks(self._renderer, self._tokenizer)
        return self._marks

    def end_ids(self) -> tuple[int, ...]:
        """The token that ends an answer, if a conversation was encoded."""
        return () if self._marks is None else tuple(self._ids(self._marks.token))

    def encode(self, examples: Iterable[Example], problems: Problems) -> Iterator[Encoded]:
        """Encodes examples in order; what cannot be encoded is noted in `problems` and passed over."""
        stream = iter(examples)
        while chunk := list(islice(stream, BATCH)):
            texts = [text for example in chunk if (text := self._text(example, problems)) is not None]
            if texts:
                yield from self._tokenise(texts, problems)

    def _text(self, example: Example, problems: Problems) -> _Text | None:
        if not example.messages:
            text = example.prompt + example.text
            learn_all = not example.prompt or self._options.loss_on == "all"
            spans = None if learn_all else [(len(example.prompt), len(text))]
            return _Text(example.where, text, spans, True, (example.weight,), example.group)
        if self._options.system is not None and example.messages[0].role != "system":
            added = (Message("system", self._options.system), *example.messages)
            example = replace(example, messages=added, learn_from=example.learn_from + (1 if example.learn_from else 0))
        if any(self._special.search(message.content) for message in example.messages):
            problems.noted["a message spells a special token, which is read as that token"] += 1
        around = self.marks
        try:
            text, spans = masks.spans(example, self._renderer, around, self._options.loss_on)
        except masks.Unsafe as error:
            problems.add(example.where, "messages", error.expected, error.got, error.code)
        except DataError as error:
            problems.add(example.where, "messages", "messages that the template takes", error.message, "data.template")
        else:
            weights: tuple[float, ...] = (example.weight,)
            if spans is not None:
                learned = masks.learned(example, self._options.loss_on)
                weights = tuple(example.messages[i].weight * example.weight for i in learned)
            elif any(message.weight != 1 for message in example.messages):
                problems.add(example.where, "messages", "no weights of messages with `loss_on: all`", "one")
                return None
            return _Text(example.where, text, spans, False, weights, example.group)
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
            trained = np.ones(len(ids), dtype=np.bool_)
            if text.spans is not None:
                trained = _inside(np.asarray(found["offset_mapping"][number], dtype=np.int64).reshape(-1, 2), text.spans)
                if not self._proven(ids, trained, text):
                    ids, trained = self._piecewise(text)
                    if not self._proven(ids, trained, text):
                        expected = f"the learned tokens to spell {text.text[slice(*text.spans[0])][:60]!r}"
                        problems.add(
                            text.where, "messages", expected, repr(self._decode(np.asarray(ids)[trained])[:60]), "data.mask"
                        )
                        continue
            if text.framed:
                ids = [*self._bos, *ids, *self._eos]
                edge = np.ones(len(self._eos), dtype=np.bool_)
                trained = np.concatenate([np.zeros(len(self._bos), dtype=np.bool_), trained, edge])
            yield Encoded(text.where, np.asarray(ids, dtype=np.uint32), trained, _weights(trained, text.weights), text.group)

    def _proven(self, ids: list[int], trained: Mask, text: _Text) -> bool:
        """Whether the learned tokens, run by run, spell the learned spans."""
        assert text.spans is not None
        edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
        runs = edges.reshape(-1, 2)
        return len(runs) == len(text.spans) and all(
            self._same(ids[start:stop], text.text[slice(*span)]) for (start, stop), span in zip(runs, text.spans, strict=True)
        )

    def _same(self, ids: list[int], span: str) -> bool:
        # Some tokenizers lose a leading space or normalise text; then the span's own round trip is the measure.
        said = self._decode(ids).strip()
        return said == span.strip() or said == self._decode(self._ids(span)).strip()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _decode(self, ids: Any) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _piecewise(self, text: _Text) -> tuple[list[int], Mask]:
        assert text.spans is not None
        ids: list[int] = []
        trained: list[bool] = []
        at = 0
        for start, stop in [*text.spans, (len(text.text), len(text.text))]:
            for piece, learn in ((text.text[at:start], False), (text.text[start:stop], True)):
                new = self._ids(piece) if piece else []
                ids += new
                trained += [learn] * len(new)
            at = stop
        return ids, np.asarray(trained, dtype=np.bool_)


def _weights(trained: Mask, weights: tuple[float, ...]) -> NDArray[np.float32] | None:
    """The weight of each token: that of its run of learned tokens, run by run, or the only one there is."""
    if all(weight == 1 for weight in weights):
        return None
    begins = np.diff(trained.astype(np.int8), prepend=0) == 1
    run = np.minimum(np.cumsum(begins), len(weights)) - 1
    return np.where(trained, np.asarray(weights, dtype=np.float32)[run], np.float32(0))


def _inside(offsets: NDArray[np.int64], spans: list[masks.Span]) -> Mask:
    """Tokens that lie wholly inside a span. offsets [n, 2]."""
    trained = np.zeros(len(offsets), dtype=np.bool_)
    for start, stop in spans:
        trained |= (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 0] < stop)
    return trained
