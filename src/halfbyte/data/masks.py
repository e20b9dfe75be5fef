"""Loss masks: which characters of a rendered conversation the model must learn to write.

An answer is everything that follows the generation prompt, up to and including the end-of-turn token: exactly what the model
writes in use. Where the template marks it with `{% generation %}`, that is taken; otherwise it is the difference between the
rendered conversation and its rendered prefix. Either way the span is checked against the answer's own text, so that a header
can never slip in. Why so strict: a wrong mask leaves a normal loss curve (TRL #3781, axolotl's FAQ, and many more). Cost: one
render more an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.data.shapes import Example, Message
from halfbyte.data.templates import Renderer
from halfbyte.errors import DataError

Span = tuple[int, int]
QUESTION, ANSWER, SECOND, LAST = "Qwertz asks", "Uiop replies", "Asdfg asks", "Hjkl replies"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Unsafe(Exception):
    """A conversation whose answer cannot be told from what surrounds it: carries `expected`, `got` and a code."""

    def __init__(self, expected: str, got: str, code: str = "data.mask") -> None:
        super().__init__(expected, got)
        self.expected, self.got, self.code = expected, got, code


@dataclass(frozen=True)
class Marks:
    """What a template writes around an answer, found by rendering a probe conversation.

    `end`: from the answer's last character through the end-of-turn token; `token`: that token alone; `headers`: what stands
    between the previous turn and an answer; `gaps`: what the template itself puts between the generation prompt and an answer
    (an empty thought, for instance), which the model has to write too.
    """

    end: str
    token: str
    headers: tuple[str, ...]
    gaps: tuple[str, ...]
    generation: bool


def marks(renderer: Renderer, tokenizer: Any) -> Marks:
    """Probes a template. Raises `DataError` (`data.no-eot`, `data.template`) for one that does not end an answer."""
    question, answer = Message("user", QUESTION), Message("assistant", ANSWER)
    probes = [([question], [answer], ANSWER), ([question, answer, Message("user", SECOND)], [Message("assistant", LAST)], LAST)]
    headers: list[str] = []
    gaps: list[str] = []
    tail = ""
    for before, after, text in probes:
        full, prompt, bare = renderer([*before, *after]), renderer(before, prompt=True), renderer(before)
        at = full.rfind(text)
        if at < 0:
            raise _template_error(renderer, "it does not write the assistant's text")
        tail = full[at + len(text) :]
        if full.startswith(prompt) and len(prompt) <= at:
            gaps.append(full[len(prompt) : at])
        if full.startswith(bare) and len(bare) <= at:
            headers.append(full[len(bare) : at])
    specials = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, specials)), tail) if specials else None
    if found is None:
        message = (
            f"the chat template `{renderer.template.name}` writes no end-of-turn token after an answer: the model would never stop"
        )
        hint = "use `template: chatml`, `alpaca` or `plain`, or write {{ eos_token }} after the answer in your Jinja file"
        raise DataError(message, hint=hint, code="data.no-eot")
    generation = GENERATION.search(renderer.template.text) is not None
    return Marks(tail[: found.end()], found.group(), tuple(dict.fromkeys(headers)), tuple(dict.fromkeys(gaps)), generation)


def _template_error(renderer: Renderer, what: str) -> DataError:
    hint = "use `template: chatml`, `alpaca` or `plain`"
    return DataError(f"the chat template `{renderer.template.name}` cannot be used: {what}", hint=hint, code="data.template")


def learned(example: Example, loss_on: str) -> list[int]:
    """The messages whose answers are learned, in order; a weight of 0 makes an answer context."""
    found = [i for i, m in enumerate(example.messages) if m.role == "assistant" and i >= example.learn_from and m.weight]
    return found[-1:] if loss_on == "last" else found


def spans(example: Example, renderer: Renderer, around: Marks, loss_on: str) -> tuple[str, list[Span] | None]:
    """The rendered text and the character spans to learn (None: all of it). Raises `Unsafe`, or `DataError` from the template."""
    messages = example.messages
    wanted = learned(example, loss_on)
    if loss_on == "all":
        full = renderer(messages)
        _nothing_dropped(messages, full)
        return full, None
    if around.generation:
        full, blocks = renderer.with_spans(messages)
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if len(blocks) != len(answers):
            raise Unsafe(f"{len(answers)} generation blocks from the template", str(len(blocks)))
        starts = {i: start for i, (start, _) in zip(answers, blocks, strict=True)}
    else:
        full = renderer(messages)
        starts = _starts(messages, wanted, full, renderer, around)
    _nothing_dropped(messages, full)
    return full, [_close(full, starts[i], messages[i].content, around) for i in wanted]


def _starts(messages: Sequence[Message], learned: list[int], full: str, renderer: Renderer, around: Marks) -> dict[int, int]:
    """Where each learned answer begins: after the rendered prefix with its generation prompt, or after the answer's header."""
    starts: dict[int, int] = {}
    for i in learned:
        before = messages[:i]
        if any(m.role == "user" for m in before):
            prompt = renderer(before, prompt=True)
            if full.startswith(prompt):
                starts[i] = len(prompt)
                continue
            bare = len(renderer(before))
            header = next((h for h in around.headers if h and full.startswith(h, bare)), None)
            if header is not None and full.startswith(renderer(before)):
                starts[i] = bare + len(header)
                continue
            raise Unsafe("a rendered prefix of the conversation", "a template that writes earlier turns differently later on")
        # Nobody asked yet: templates differ in what they write before such an opening answer, so its header is looked for.
        opening = next(
            (h + messages[i].content.strip() for h in around.headers if h and h + messages[i].content.strip() in full), None
        )
        if opening is None:
            raise Unsafe("a question before the first answer", "an answer that this template does not write after its usual header")
        starts[i] = full.index(opening) + len(opening) - len(messages[i].content.strip())
    return starts


def _close(full: str, start: int, content: str, around: Marks) -> Span:
    """From the start to the end-of-turn token, with the answer's text proven to be all that lies between."""
    text = content.strip()
    at = full.find(text, start)
    if at < 0:
        raise Unsafe("the answer's own text", "a template that changes it (a removed thought, for instance)")
    gap = full[start:at]
    if gap.strip() and gap not in around.gaps:
        raise Unsafe("nothing between the generation prompt and the answer", repr(gap[:60]))
    stop = at + len(text)
    if full.startswith(around.end, stop):
        return start, stop + len(around.end)
    while stop < len(full) and full[stop].isspace():
        stop += 1
    if not full.startswith(around.end.lstrip(), stop):
        raise Unsafe(f"the end-of-turn token {around.token} after the answer", repr(full[stop : stop + 20]), "data.no-eot")
    return start, stop + len(around.end.lstrip())


def _nothing_dropped(messages: Sequence[Message], full: str) -> None:
    for message in messages:
        if message.role != "assistant" and message.content.strip() not in full:
            raise Unsafe(f"the {message.role} message in the rendered text", "a template that drops or changes it", "data.template")
