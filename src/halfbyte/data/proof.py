"""What is known of a rendered conversation, and the proof of what is to be learned of it: every word of the learned answers, and
no other.

Why apart from how the spans are found (masks.py): whatever finds them is held to this. Cost: a few comparisons a message.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from halfbyte.data.rendering import Place, Tools, marked_copy
from halfbyte.data.turns import Message

Span = tuple[int, int]
Text = tuple[str, list[Span]]  # a rendered text, and the spans of its generation blocks


class Unsafe(Exception):
    """A conversation whose answer cannot be told from what surrounds it: carries `expected`, `got` and a code."""

    def __init__(self, expected: str, got: str, code: str = "data.mask") -> None:
        super().__init__(expected, got)
        self.expected, self.got, self.code = expected, got, code


@dataclass(frozen=True)
class Rendered:
    """A conversation, its text, where its words stand, and the spans of its generation blocks."""

    messages: Sequence[Message]
    tools: Tools
    text: str
    places: Sequence[Place]
    blocks: Sequence[Span] = ()

    def of(self, message: int) -> list[Place]:
        """The places of one message."""
        return [place for place in self.places if place.piece.message == message]

    def before(self, at: int) -> Place | None:
        """The last words that end at or before a character."""
        return max((p for p in self.places if p.stop <= at), key=lambda p: p.stop, default=None)

    def after(self, at: int) -> Place | None:
        """The first words that begin at or after a character."""
        return min((p for p in self.places if p.start >= at), key=lambda p: p.start, default=None)

    def role(self, place: Place | None) -> str:
        """Who says the words at a place."""
        return "" if place is None else self.messages[place.piece.message].role


@dataclass(frozen=True)
class Learned:
    """A span of characters to learn, and the message that it belongs to.

    prompted: what the generation prompt writes there that the finished turn does not show (an opened thought).
    """

    start: int
    stop: int
    message: int
    prompted: str = ""


def nothing_lost(messages: Sequence[Message], places: Sequence[Place], learn: Sequence[int]) -> None:
    """Every message must be there, word for word and once; a thought may be missing where it is not learned."""
    for i, message in enumerate(messages):
        code = "data.mask" if i in learn else "data.template"
        wanted = Counter(piece.kind for piece in marked_copy([message])[1])
        found = Counter(place.piece.kind for place in places if place.piece.message == i)
        if i in learn and not wanted:
            raise Unsafe("an answer with words", "an empty one")
        if i in learn and message.reasoning.strip() and found["thought"] < wanted["thought"]:
            raise Unsafe("the thought (`reasoning_content`) in the rendered text", "a template that leaves it out")
        if i in learn and (found["content"] < wanted["content"] or found["thought"] < wanted["thought"]):
            raise Unsafe("the answer's own text", "a template that changes it (a removed thought, words beside a tool call)")
        kept = found["rest"] if message.role == "assistant" else 0  # an earlier answer may lose a thought
        if found["content"] + kept < wanted["content"]:
            raise Unsafe(f"the {message.role} message in the rendered text", "a template that drops or changes it", code)
        if found["call"] < wanted["call"]:
            raise Unsafe("the tool call in the rendered text", "a template that drops or changes it", "data.template")
        if found.total() > wanted.total():
            raise Unsafe(f"the {message.role} message once", "a template that writes it more than once", code)


def all_but_results(talk: Rendered) -> list[Learned] | None:
    """Everything but the words of tools."""
    results = [p for p in talk.places if talk.role(p) == "tool"]
    if not results:
        return None
    edges = [0, *(edge for p in results for edge in (p.start, p.stop)), len(talk.text)]
    owner = next(i for i, m in enumerate(talk.messages) if m.role != "tool")
    return [Learned(a, b, owner) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def prove(talk: Rendered, found: Sequence[Learned], learn: Sequence[int]) -> None:
    """Holds the spans against the words: each learned answer's inside its own spans, nobody else's in any, calls whole."""
    if any(a.stop > b.start for a, b in pairwise(found)):
        raise Unsafe("answers one after the other", "two that overlap")
    for place in talk.places:
        inside = [span.message for span in found if span.start <= place.start and place.stop <= span.stop]
        touched = [span.message for span in found if span.start < place.stop and place.start < span.stop]
        mine = place.piece.message
        wanted = [[mine]] if mine in learn else [[]]
        if mine in learn and place.piece.kind == "thought":
            wanted.append([])  # generation blocks may leave a thought out
        if place.start < place.stop and (touched != inside or touched not in wanted):
            raise Unsafe("only the answer's own words to learn", repr(talk.text[place.start : place.stop][:60]))
    for i in learn:
        said = "".join(talk.text[span.start : span.stop] for span in found if span.message == i).replace("\\", "")
        for leaf in _leaves([call["function"]["arguments"] for call in talk.messages[i].tool_calls]):
            # As it is, as JSON or as Python; which quotes are escaped is the template's affair.
            written = (leaf, json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1])
            if not any(form.replace("\\", "") in said for form in written):
                raise Unsafe(
                    "the tool call's arguments in the rendered text", "a template that drops or changes them", "data.template"
                )


def _leaves(value: Any) -> Iterator[str]:
    """Every text in a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
