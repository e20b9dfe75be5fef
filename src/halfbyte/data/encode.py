"""From examples to token ids and a mask of the tokens to learn.

A conversation is rendered whole, `masks.py` says which characters are learned, and `aligned.py` which tokens those are, proven
span by span. Why: a wrong mask is silent. Cost: about a tenth of a millisecond for an example of 300 tokens, a third of it the
template's; five times that where the tokenizer must do without fastokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import masks, proof
from halfbyte.data.aligned import Aligner
from halfbyte.data.problems import Problems, Where
from halfbyte.data.rendering import Renderer
from halfbyte.data.templates import Template, adds_bos
from halfbyte.data.turns import Example, Message
from halfbyte.errors import DataError

BATCH = 256  # examples tokenised in one call
HALF = re.compile("[\ud800-\udfff]")  # surrogates, which JSON can spell alone; no tokenizer takes them

Ids = NDArray[np.uint32]
Mask = NDArray[np.bool_]
Span = proof.Span


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

    def __init__(self, tokenizer: Any, template: Template, options: Options, quick: bool = False) -> None:
        if not tokenizer.is_fast:
            hint = "load the tokenizer from its tokenizer.json"
            raise DataError(
                "this tokenizer cannot say which characters a token stands for (it is not a fast one)", hint=hint, code="data.mask"
            )
        self._tokenizer = tokenizer
        self._aligner = Aligner(tokenizer, quick)
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
        """The tokens that ended an answer so far, if a conversation was encoded."""
        ends = set() if self._masker is None else self._masker.ends
        return tuple(sorted({token for end in ends for token in self._aligner.ids(end)[-1:]}))

    def encode(self, examples: Iterable[Example], problems: Problems) -> Iterator[Encoded]:
        """Encodes examples in order; what cannot be encoded is noted in `problems` and passed over."""
        stream = (part for example in examples for part in self._parts(example))
        while chunk := list(islice(stream, BATCH)):
            asked = [example for e in chunk if (example := self._asked(e, problems)) is not None]
            talks = [example for example in asked if example.messages]
            rendered = iter(self.masker.render(talks) if talks else ())
            texts = [self._text(example, next(rendered) if example.messages else None, problems) for example in asked]
            if whole := [text for text in texts if text is not None]:
                yield from self._tokenise(whole, problems)

    def _parts(self, example: Example) -> list[Example]:
        """With `loss_on: each`, one example an answer, which ends there; they stay on one side of the split."""
        if self._options.loss_on != "each" or not example.messages:
            return [example]
        group = example.group or str(example.where)
        cuts = masks.chosen(example, "each")
        return [replace(example, messages=example.messages[: i + 1], learn_from=i, group=group) for i in cuts]

    def _asked(self, example: Example, problems: Problems) -> Example | None:
        """The example as it is rendered, with its system message; None after a mistake was noted."""
        if not example.messages:
            return example
        if self._options.system is not None and example.messages[0].role != "system":
            added = (Message("system", self._options.system), *example.messages)
            example = replace(example, messages=added, learn_from=example.learn_from + (1 if example.learn_from else 0))
        if any(self._special.search(message.content) for message in example.messages):
            problems.noted["a message spells a special token, which is read as that token"] += 1
        if self._options.loss_on == "all" and any(message.weight != 1 for message in example.messages):
            problems.add(example.where, "messages", "no weights of messages with `loss_on: all`", "one")
            return None
        return example

    def _text(self, example: Example, rendered: proof.Text | None, problems: Problems) -> _Text | None:
        if not example.messages:
            text = example.prompt + example.text
            if half := HALF.search(text):
                problems.add(example.where, "text", "text", f"half a character (U+{ord(half[0]):X})")
                return None
            spans = None if not example.prompt or self._options.loss_on == "all" else [(len(example.prompt), len(text))]
            return _Text(example.where, text, spans, True, (example.weight,), example.group)
        try:
            text, learned = self.masker.spans(example, self._options.loss_on, rendered)
        except proof.Unsafe as error:
            problems.add(example.where, "messages", error.expected, error.got, error.code)
        except DataError as error:
            problems.add(example.where, "messages", "messages that the template takes", error.message, "data.template")
        else:
            if not text.isascii() and (half := HALF.search(text)):
                problems.add(example.where, "messages", "text", f"half a character (U+{ord(half[0]):X})")
                return None
            if learned is None:
                return _Text(example.where, text, None, False, (example.weight,), example.group)
            if learned and learned[-1].prompted:
                what = f"the generation prompt ends in {learned[-1].prompted!r}, which the finished answer does not show"
                problems.noted[what] += 1
            weights = tuple(example.messages[span.message].weight * example.weight for span in learned)
            return _Text(example.where, text, [(s.start, s.stop) for s in learned], False, weights, example.group)
        return None

    def _tokenise(self, texts: list[_Text], problems: Problems) -> Iterator[Encoded]:
        found = self._aligner([text.text for text in texts], [text.spans for text in texts])
        for text, (ids, runs) in zip(texts, found, strict=True):
            if runs is None:
                assert text.spans
                expected = f"the learned tokens to spell {text.text[slice(*text.spans[0])][:60]!r}"
                problems.add(text.where, "messages", expected, "tokens that cannot be told apart", "data.mask")
                continue
            front = self._bos if text.framed else []
            whole = np.asarray([*front, *ids.tolist(), *self._eos], dtype=np.uint32) if text.framed else ids
            runs = [(0, len(ids))] if text.spans is None else runs
            # The eos that frames a text belongs to what comes before it.
            runs = [(a + len(front), len(whole) if text.framed and b == len(ids) else b + len(front)) for a, b in runs]
            trained = np.zeros(len(whole), dtype=np.bool_)
            for first, last in runs:
                trained[first:last] = True
            weights = None if all(weight == 1 for weight in text.weights) else np.zeros(len(whole), dtype=np.float32)
            if weights is not None:
                for (first, last), weight in zip(runs, text.weights, strict=True):
                    weights[first:last] = weight
            yield Encoded(text.where, whole, trained, weights, text.group)
