"""Rendering: a conversation as the text that a chat template makes of it, and where in that text its words stand.

Templates want the same conversation in different forms: content as text or as a list of parts, a tool call's arguments as an
object or as JSON text, the content beside a tool call empty or null. The forms are tried on a probe, and the first in which
nothing is lost is kept. Where words stand is found by rendering once more with marks around them (noncharacters of Unicode,
which no text holds): the template itself says where they went. Rendering is transformers' sandboxed Jinja. Cost: about 50
microseconds a render.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from halfbyte.data.templates import Template
from halfbyte.data.turns import Message
from halfbyte.errors import DataError

Tools = Sequence[Mapping[str, Any]]
OPEN, CLOSE, ZERO = "\ufdd0", "\ufdd1", 0xFDD2  # a mark is OPEN or CLOSE and four digits to base 16, counted from ZERO
MARK = re.compile(f"({OPEN}|{CLOSE})([{chr(ZERO)}-{chr(ZERO + 15)}]{{4}})")
RESERVED = re.compile(f"[{OPEN}-{chr(ZERO + 15)}]")
THOUGHT_TAG = re.compile(r"(</?think(?:ing)?>)")
PINNED = datetime.date(2024, 7, 26)  # what a template gets for today, so that the same data is the same on every day
NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
CALL = {"type": "function", "function": {"name": "qwertz_uiop", "arguments": {"asdfg": "hjkl yxcv"}}}


# What a template can raise besides Jinja's own errors: it divides by zero, repeats a text endlessly, or is nested too deeply.
RAISED = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)


class Piece(NamedTuple):
    """Words of a message: `kind` is thought, content, call (the name of a function that it calls), or rest (of changed words)."""

    message: int
    kind: str
    text: str


class Place(NamedTuple):
    """Where a piece stands in a rendered text, in characters; whitespace around it is outside."""

    piece: Piece
    start: int
    stop: int


class Form(NamedTuple):
    """How a template wants to be given a conversation."""

    parts: bool = False  # content as [{"type": "text", "text": ...}]
    text: bool = False  # a tool call's arguments as JSON text
    null: bool = False  # no content beside a tool call is null, not ""


class Renderer:
    """Renders conversations of one tokenizer and one template."""

    def __init__(self, template: Template, tokenizer: Any) -> None:
        self.template = template
        self._text = _pinned(template.text)
        self._kwargs = dict(tokenizer.special_tokens_map)
        self._form: Form | None = None
        self._calling: Form | None = None

    def __call__(self, messages: Sequence[Message], prompt: bool = False, tools: Tools = ()) -> str:
        """The text of a conversation; with `prompt`, up to where the assistant's next answer begins.

        Raises `DataError` (`data.template`) where the template refuses it.
        """
        return self._render(messages, prompt, False, tools, self.form(messages))[0]

    def with_spans(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans of its `{% generation %}` blocks."""
        return self._render(messages, False, True, tools, self.form(messages))

    def several(self, talks: Sequence[Sequence[Message]], spans: bool) -> list[tuple[str, list[tuple[int, int]]] | None]:
        """What `with_spans` gives for conversations without tools (without `spans`, no spans), for a third less than one by one.

        None for all where one is refused, and for those that call tools: ask for each.
        """
        plain = [not any(m.tool_calls for m in messages) for messages in talks]
        chosen = [messages for messages, good in zip(talks, plain, strict=True) if good]
        if not chosen:
            return [None] * len(talks)
        try:
            found = iter(self._render_all(chosen, False, spans, (), self.form(chosen[0])))
        except DataError:
            return [None] * len(talks)
        return [next(found) if good else None for good in plain]

    def places(self, messages: Sequence[Message], prompt: bool = False, tools: Tools = ()) -> tuple[str, list[Place]]:
        """The text, and where in it each piece of the messages stands, in the order of the text.

        A piece that the template drops is missing, and one that it writes twice is there twice. The text is the one that marked
        messages give: whoever relies on the places compares it with the unmarked one.
        """
        marked, pieces = marked_copy(messages)
        return _unmark(self._render(marked, prompt, False, tools, self.form(messages))[0], pieces)

    def form(self, messages: Sequence[Message]) -> Form:
        """The form for these messages, from a probe at first use."""
        if self._form is None:
            probe = [Message("user", "Qwertz asks"), Message("assistant", "Uiop replies")]
            self._form = next((f for f in (Form(), Form(parts=True)) if self._keeps(probe, f, [m.content for m in probe])), Form())
        if not any(m.tool_calls for m in messages):
            return self._form
        if self._calling is None:
            probe = [Message("user", "Qwertz asks"), Message("assistant", "", tool_calls=(CALL,))]
            forms = [Form(self._form.parts, text, null) for null in (False, True) for text in (False, True)]
            words = ["qwertz_uiop", "asdfg", "hjkl yxcv"]
            self._calling = next((f for f in forms if self._keeps(probe, f, words)), forms[0])
        return self._calling

    def _keeps(self, probe: Sequence[Message], form: Form, words: Sequence[str]) -> bool:
        """Whether a form loses no word, and writes arguments neither as Python nor quoted twice."""
        try:
            text = self._render(probe, False, False, (), form)[0]
        except DataError:
            return False
        return all(word in text for word in words) and "{'" not in text and '\\"' not in text

    def _render(
        self, messages: Sequence[Message], prompt: bool, spans: bool, tools: Tools, form: Form
    ) -> tuple[str, list[tuple[int, int]]]:
        return self._render_all([messages], prompt, spans, tools, form)[0]

    def _render_all(
        self, talks: Sequence[Sequence[Message]], prompt: bool, spans: bool, tools: Tools, form: Form
    ) -> list[tuple[str, list[tuple[int, int]]]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            result: Any = render_jinja_template(
                [chat(messages, form) for messages in talks],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **self._kwargs,
            )
        except (TemplateError, *RAISED) as error:
            message = f"the chat template `{self.template.name}` refused these messages: {error}"
            hint = "check the order of roles (a system message first, then user and assistant in turn)"
            raise DataError(message, hint=hint, code="data.template") from error
        texts, found = result  # annotated as str in transformers, but it is a pair of lists
        return list(zip(texts, found, strict=True)) if spans else [(text, []) for text in texts]


def chat(messages: Sequence[Message], form: Form) -> list[dict[str, Any]]:
    """What a template is given. Tool calls without an id get one, and results without one the id of the call they answer."""
    turns: list[dict[str, Any]] = []
    waiting: list[str] = []
    calls = 0
    for message in messages:
        content: Any = message.content
        if form.null and message.tool_calls and not content:
            content = None
        elif form.parts:
            content = [{"type": "text", "text": content}] if content else []
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if message.tool_calls:
            turn["tool_calls"] = []
            for call in message.tool_calls:
                calls += 1
                # Nine letters and digits: Mistral's templates take no other.
                turn["tool_calls"].append(_call(call, call.get("id") or f"call{calls:05d}", form))
                waiting.append(turn["tool_calls"][-1]["id"])
        if message.role == "tool":
            answered = waiting.pop(0) if waiting else ""
            turn["tool_call_id"] = message.tool_call_id or answered
            turn |= {"name": message.name} if message.name else {}
        turns.append(turn)
    return turns


def _call(call: Mapping[str, Any], name: str, form: Form) -> dict[str, Any]:
    body = call["function"]
    arguments = json.dumps(body["arguments"], ensure_ascii=False) if form.text else body["arguments"]
    return {"type": "function", "id": name, "function": {"name": body["name"], "arguments": arguments}}


def marked_copy(messages: Sequence[Message]) -> tuple[list[Message], list[Piece]]:
    """The messages with marks around their pieces, and the pieces, numbered as the marks are.

    A thought that is written inside a content, between `<think>` tags, is a piece of its own: templates take it out.
    """
    pieces: list[Piece] = []

    def mark(text: str, message: int, kind: str) -> str:
        core = text.strip()
        if not core:
            return text
        digits = "".join(chr(ZERO + (len(pieces) >> shift & 15)) for shift in (12, 8, 4, 0))
        pieces.append(Piece(message, kind, core))
        at = text.index(core)
        return f"{text[:at]}{OPEN}{digits}{core}{CLOSE}{digits}{text[at + len(core) :]}"

    copies: list[Message] = []
    for number, message in enumerate(messages):
        thought = mark(message.reasoning, number, "thought")
        parts = THOUGHT_TAG.split(message.content) if message.role == "assistant" else [message.content]
        last = max((i for i, part in enumerate(parts) if i % 2), default=-1)
        content = "".join(p if i % 2 else mark(p, number, "content" if i > last else "thought") for i, p in enumerate(parts))
        calls = tuple(
            {**call, "function": {**call["function"], "name": mark(call["function"]["name"], number, "call")}}
            for call in message.tool_calls
        )
        copies.append(message._replace(content=content, reasoning=thought, tool_calls=calls))
    return copies, pieces


def _unmark(text: str, pieces: Sequence[Piece]) -> tuple[str, list[Place]]:
    clean: list[str] = []
    places: list[Place] = []
    opened: dict[int, int] = {}
    length = at = 0
    for mark in MARK.finditer(text):
        clean.append(text[at : mark.start()])
        length += len(clean[-1])
        at = mark.end()
        number = sum((ord(digit) - ZERO) << shift for digit, shift in zip(mark[2], (12, 8, 4, 0), strict=True))
        if mark[1] == OPEN:
            opened[number] = length
        else:
            places.append(Place(pieces[number], opened.pop(number, length), length))
    whole = "".join([*clean, text[at:]])
    places = [
        p if _said(p.piece.text, whole[p.start : p.stop]) else p._replace(piece=p.piece._replace(kind="rest")) for p in places
    ]
    places.sort(key=lambda place: (place.start, place.stop))
    # The name of a function comes again with what it answered; the call is where it comes first.
    return whole, [p for i, p in enumerate(places) if p.piece.kind != "call" or all(q.piece is not p.piece for q in places[:i])]


def _said(words: str, written: str) -> bool:
    """Whether words stand there as they are, or as JSON (what tools answer, in some templates)."""
    return written in (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])


def shared(one: str, other: str) -> str:
    """What two texts begin with in common."""
    short = min(len(one), len(other))
    return one[: next((i for i in range(short) if one[i] != other[i]), short)]


def _pinned(text: str) -> str:
    """The template with a fixed day in the place of today. Only data is rendered so; what is saved keeps today."""
    formats = dict.fromkeys(found[1] for found in NOW.findall(text))
    if not formats:
        return text
    says = "".join(f"{{% if f == {json.dumps(f)} %}}{PINNED.strftime(f)}{{% endif %}}" for f in formats)
    # A line break right after a block is swallowed, so one that the template begins with is written twice.
    return "{% macro strftime_now(f) %}" + says + "{% endmacro %}" + ("\n" if text.startswith("\n") else "") + text
