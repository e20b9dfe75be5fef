"""Loss masks: which characters of a rendered conversation the model must learn to write.

An answer is everything that follows the generation prompt, up to and including the end-of-turn token: exactly what the model
writes in use. It is found from the template itself. The words of every message are located (rendering.py); an answer begins
where the generation prompt after the words before it ends, and it ends with the end-of-turn token after its own words, both
taken from renders of the conversation cut short. `{% generation %}` blocks narrow that down and are held to the same proof: all
words of a learned answer are inside, no others, and no header. Whatever does not fit is an error, never a guess.

Why so strict: a wrong mask leaves a normal loss curve (TRL #3781, axolotl's FAQ, and many more). Cost: what stands between the
words of a plain conversation is known from a few probes, and takes one render; anything else takes about three an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.data.probe import marks
from halfbyte.data.proof import Learned, Rendered, Span, Text, Unsafe, all_but_results, nothing_lost, prove
from halfbyte.data.rendering import RESERVED, Piece, Place, Renderer, Tools, shared
from halfbyte.data.turns import Example, Message, Role
from halfbyte.errors import DataError

ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
PROBES = ("ua", "uaua", "uauaua", "sua", "suaua", "suauaua")  # conversations whose texts between words are remembered


def chosen(example: Example, loss_on: str | Collection[str]) -> list[int]:
    """The messages to learn: never what a tool answered, nor what carries a weight of 0."""
    roles = ("assistant",) if isinstance(loss_on, str) else loss_on
    found = [i for i, m in enumerate(example.messages) if m.role in roles and m.role != "tool" and i >= example.learn_from]
    found = [i for i in found if example.messages[i].weight]
    return found[-1:] if loss_on == "last" else found


class Masker:
    """Finds and proves the spans to learn, for one tokenizer and one template."""

    def __init__(self, renderer: Renderer, tokenizer: Any) -> None:
        self.marks = marks(renderer, tokenizer)
        self.ends = set(self.marks.ends)  # and those of tool calls, once one was seen
        self._render = renderer
        self._gaps: dict[tuple[str, str], list[str]] = {}  # roles on both sides: texts between their words
        self._starts: dict[tuple[str, str], tuple[int, str]] = {}  # role before, text between: how much is not the answer's
        self._stops: dict[tuple[str, str], int] = {}  # role after, text between: how much of it is the answer's
        for probe in PROBES:
            self._learn(probe)

    def _learn(self, roles: str) -> None:
        """Remembers what stands between the words of a conversation of these roles (s, u, a). Only probes are remembered: what
        comes out for an example must not depend on the examples before it."""
        messages = tuple(Message(ROLES[role], f"{role}qwertz{i}") for i, role in enumerate(roles))
        try:
            talk = self._located(messages, (), self._render(messages), [], [])
            plain = [place.piece for place in talk.places] == [Piece(i, "content", m.content) for i, m in enumerate(messages)]
            learn = [i for i, m in enumerate(messages) if m.role == "assistant"] if plain else []
            starts, stops = [self._start(talk, i) for i in learn], [self._stop(talk, i) for i in learn]
        except (Unsafe, DataError):
            return
        at, before = 0, ""
        for number, place in enumerate((*talk.places, None) if plain else ()):
            gap = talk.text[at : place.start if place else None]
            after = talk.role(place)
            known = self._gaps.setdefault((before, after), [])
            if gap not in known:
                known.append(gap)
            if after == "assistant":
                self._starts[before, gap] = (starts[learn.index(number)][0] - at, starts[learn.index(number)][1])
            stop = stops[learn.index(number - 1)] if before == "assistant" else None
            if stop is not None:
                self._stops[after, gap] = stop - at
            at, before = place.stop if place else at, after

    def render(self, examples: Sequence[Example]) -> list[Text | None]:
        """The texts of conversations, with the spans of their generation blocks; None where `spans` must render one alone."""
        plain = [not example.tools for example in examples]
        talks = [example.messages for example, good in zip(examples, plain, strict=True) if good]
        found = iter(self._render.several(talks, self.marks.generation))
        return [next(found) if good else None for good in plain]

    def spans(
        self, example: Example, loss_on: str | Collection[str], rendered: Text | None = None
    ) -> tuple[str, list[Learned] | None]:
        """The rendered text (`rendered`, if it was before), and the spans to learn in their order (None: all of it).

        Raises `Unsafe`, or `DataError` from the template.
        """
        learn = [] if loss_on == "all" else chosen(example, loss_on)
        messages, tools = example.messages, example.tools
        text, blocks = rendered or self._text(messages, tools)
        places = self._parsed(messages, text)
        if places and learn and not tools and (known := self._known(messages, text, places, blocks, learn)) is not None:
            return text, known
        talk = Rendered(messages, tools, text, places, blocks) if places else self._located(messages, tools, text, blocks, learn)
        unseen = next((name for tool in tools if (name := _name(tool)) not in text), None)
        if unseen is not None:
            raise Unsafe(f"the tool `{unseen}` in the rendered text", "a template that does not show tools", "data.template")
        if loss_on == "all":
            return talk.text, all_but_results(talk)
        found: list[Learned] = []
        for i in learn:
            if talk.messages[i].role != "assistant":
                found.append(self._spoken(talk, i))
                continue
            (start, prompted), stop = self._start(talk, i), self._stop(talk, i)
            if stop is None:  # the last answer of a template that closes no turn: what would follow it is written
                text += self._next_opening(talk, i)
                stop = len(text)
            found.append(Learned(start, stop, i, prompted))
        if self.marks.generation:
            found = self._within_blocks(talk, found)
        prove(talk, found, learn)
        return text, found

    def _text(self, messages: Sequence[Message], tools: Tools) -> Text:
        return self._render.with_spans(messages, tools) if self.marks.generation else (self._render(messages, tools=tools), [])

    def _known(
        self, messages: Sequence[Message], text: str, places: Sequence[Place], blocks: Sequence[Span], learn: Sequence[int]
    ) -> list[Learned] | None:
        """The spans of answers between texts that the probes have shown, each with one block around its words, if any; else None.

        Such a span begins in the text before its answer's words and ends in the one after them, so it holds no others.
        """
        found: list[Learned] = []
        for i in learn:
            place = places[i]
            at, before = (places[i - 1].stop, messages[i - 1].role) if i else (0, "")
            end, after = (places[i + 1].start, messages[i + 1].role) if i + 1 < len(places) else (len(text), "")
            start, stop = self._starts.get((before, text[at : place.start])), self._stops.get((after, text[place.stop : end]))
            if messages[i].role != "assistant" or start is None or stop is None:
                return None
            begin, last = at + start[0], place.stop + stop
            if self.marks.generation:
                inside = [(a, b) for a, b in blocks if a < last and b > begin]
                if len(inside) != 1 or not at <= inside[0][0] <= place.start or not place.stop <= inside[0][1] <= end:
                    return None
                begin = max(begin, inside[0][0])
            found.append(Learned(begin, last, i, start[1]))
        # With as many blocks as answers, and one in each, there is none around anything else.
        answers = sum(message.role == "assistant" for message in messages)
        return found if not self.marks.generation or len(blocks) == len(found) == answers else None

    def _located(
        self, messages: Sequence[Message], tools: Tools, text: str, blocks: Sequence[Span], learn: Sequence[int]
    ) -> Rendered:
        if any(RESERVED.search(text) for m in messages for text in (m.content, m.reasoning)):
            raise Unsafe("text", "noncharacters of Unicode (U+FDD0 to U+FDE1)")
        again, places = self._render.places(messages, tools=tools)
        if again != text:
            raise Unsafe("words that the template writes as they are", "a template that reads them and acts on what they say")
        nothing_lost(messages, places, learn)
        return Rendered(messages, tools, text, places, blocks)

    def _parsed(self, messages: Sequence[Message], text: str) -> list[Place] | None:
        """The words of plain messages, with or without the space around them, if all that stands between them is known."""
        places: list[Place] = []
        at, before = 0, ""
        for number, message in enumerate(messages):
            words = message.content.strip()
            if not words or message.reasoning or message.tool_calls:
                return None
            known = self._gaps.get((before, message.role), ())
            tried = ((at + len(g), w) for g in known if text.startswith(g, at) for w in (message.content, words))
            start, said = next(((start, w) for start, w in tried if text.startswith(w, start)), (0, ""))
            if not said:
                return None
            at, before = start + len(said), message.role
            places.append(Place(Piece(number, "content", words), start, at))
        return places if text[at:] in self._gaps.get((before, ""), ()) else None

    def _start(self, talk: Rendered, i: int) -> tuple[int, str]:
        """Where an answer begins: behind the generation prompt, or behind its header where the finished turn has less than that."""
        first = talk.of(i)[0].start
        before = talk.before(first)
        at = before.stop if before else 0
        gap = talk.text[at:first]
        key = (talk.role(before), gap)
        if key not in self._starts:
            prompt, prompted = self._prompt(talk, i, before), ""
            if prompt is not None and gap.startswith(prompt):
                length = len(prompt)
            else:
                # A prompt that opens a thought which the finished turn does not show, or an answer that nobody asked for.
                common = gap if prompt is None or before is None else shared(gap, prompt)
                length = common.rfind(self.marks.header) + len(self.marks.header)
                if not self.marks.header or length < len(self.marks.header):
                    raise Unsafe("the generation prompt before the answer", repr(gap[-60:]))
                prompted = prompt[length:] if prompt and before else ""
            if any(mark and mark in gap[length:] for mark in (*self.marks.ends, self.marks.header)):
                raise Unsafe("nothing of another turn between the generation prompt and the answer", repr(gap[length:][:60]))
            return at + length, prompted
        length, prompted = self._starts[key]
        return at + length, prompted

    def _prompt(self, talk: Rendered, i: int, before: Place | None) -> str | None:
        """What the generation prompt writes after the last words before an answer; None where a prompt has other words there."""
        try:
            text, places = self._render.places(talk.messages[:i], prompt=True, tools=talk.tools)
        except DataError:
            return None
        last = max(places, key=lambda place: place.stop, default=None)
        if (last and last.piece) != (before and before.piece):
            return None
        return text[last.stop if last else 0 :]

    def _stop(self, talk: Rendered, i: int) -> int | None:
        """Where an answer ends: with its end-of-turn token; None where a token must be borrowed and nothing follows."""
        last = talk.of(i)[-1].stop
        after = talk.after(last)
        gap = talk.text[last : after.start if after else None]
        key = (talk.role(after), gap)
        plain = not talk.messages[i].tool_calls
        if plain and key in self._stops:
            return last + self._stops[key]
        length = self._closing(talk, i, gap, plain)
        if length is None:
            if after is None and self.marks.borrowed:
                return None
            raise Unsafe(f"the end-of-turn token {self.marks.ends[0]} after the answer", repr(gap[:20]), "data.no-eot")
        return last + length

    def _closing(self, talk: Rendered, i: int, gap: str, plain: bool) -> int | None:
        """How much of the text after an answer's words is its own."""
        space = len(gap) - len(gap.lstrip())
        if plain:
            end = next((e for e in self.marks.ends if gap.startswith(e, space)), None)
            if end:
                return space + len(end)
        # Tags that close a tool call, for instance: within what the turn writes when nothing follows it.
        text, places = self._render.places(talk.messages[: i + 1], tools=talk.tools)
        mine = [place for place in places if place.piece.message == i]
        turn = shared(gap, text[mine[-1].stop :]) if mine and mine[-1] is places[-1] else ""
        if self.marks.borrowed:
            opening = self.marks.specials.match(gap, len(turn) + len(gap[len(turn) :]) - len(gap[len(turn) :].lstrip()))
            if opening is None:
                return None
            self.ends.add(opening[0])
            return opening.end()
        ends = [(at, e) for e in self.marks.ends if (at := turn.find(e) if plain else turn.rfind(e)) >= 0]
        if ends:
            at, end = min(ends) if plain else max(ends)
            return at + len(end)
        if plain:
            return None
        before = talk.before(talk.of(i)[0].start)
        length = self.marks.last_special(talk.text[before.stop if before else 0 : talk.of(i)[-1].stop], turn)
        if length is not None:
            self.ends.add(self.marks.one.findall(turn[:length])[-1])
        return length

    def _next_opening(self, talk: Rendered, i: int) -> str:
        """What follows an answer when the conversation goes on, up to the special token that opens the next turn."""
        answered = talk.messages[i].tool_calls
        more = Message("tool", "Yxcv answers") if answered else Message("user", "Yxcv asks")
        text, places = self._render.places([*talk.messages, more], tools=talk.tools)
        written = talk.text[talk.of(i)[-1].stop :]
        at = max((place.stop for place in places if place.piece.message == i), default=0)
        opening = self.marks.specials.search(text, at + len(written)) if text.startswith(written, at) else None
        if opening is None or text[at + len(written) : opening.start()].strip():
            raise Unsafe("a token that ends the answer", "a template that closes no turn", "data.no-eot")
        self.ends.add(opening[0])
        return text[at + len(written) : opening.end()]

    def _spoken(self, talk: Rendered, i: int) -> Learned:
        """The words of a message that is not the assistant's, with the end-of-turn token if that is what follows."""
        mine = talk.of(i)
        rest = talk.text[mine[-1].stop :]
        space = len(rest) - len(rest.lstrip())
        end = next((e for e in self.marks.ends if rest.startswith(e, space)), None)
        return Learned(mine[0].start, mine[-1].stop + (space + len(end) if end and not self.marks.borrowed else 0), i)

    def _within_blocks(self, talk: Rendered, found: list[Learned]) -> list[Learned]:
        """What of the answers the template marks to be learned, its end-of-turn token always."""
        blocks = talk.blocks
        others = [p for p in talk.places if talk.role(p) != "assistant"]
        wrong = next((p for p in others if any(a < p.stop and p.start < b for a, b in blocks)), None)
        if wrong is not None:
            raise Unsafe("generation blocks around the assistant's words only", f"one around words of {talk.role(wrong)}")
        kept: list[Learned] = []
        for span in found:
            mine = talk.of(span.message)
            parts = [(max(a, span.start), min(b, span.stop)) for a, b in blocks if a < span.stop and b > span.start]
            if not parts or any(not any(a <= p.start and p.stop <= b for a, b in parts) for p in mine if p.piece.kind != "thought"):
                raise Unsafe("a generation block around every word of an answer", "none around some of them")
            parts[-1] = (parts[-1][0], span.stop)
            joined = [Learned(*parts[0], span.message, span.prompted)]
            for a, b in parts[1:]:
                joined[-1:] = [replace(joined[-1], stop=b)] if a == joined[-1].stop else [joined[-1], Learned(a, b, span.message)]
            kept += joined
        return kept


def _name(tool: Mapping[str, Any]) -> str:
    body = tool.get("function", tool)
    return str(body.get("name", "")) if isinstance(body, Mapping) else ""
