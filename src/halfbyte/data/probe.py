"""What a chat template writes around an answer, found by rendering probe conversations: its header and its end-of-turn token.

Why probed and not listed by name: a template that somebody edited is as good as a known one, and the proof in masks.py holds for
both. Cost: five renders a template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from halfbyte.data.rendering import Piece, Renderer, shared
from halfbyte.data.templates import GENERATION
from halfbyte.data.turns import Message
from halfbyte.errors import DataError

ASKED, ANSWERED = Message("user", "Qwertz asks"), Message("assistant", "Uiop replies")
AGAIN = [Message("user", "Asdfg asks"), Message("assistant", "Hjkl replies")]
EMPTY_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?$")


@dataclass(frozen=True)
class Marks:
    """What stands around an answer.

    ends: the end-of-turn token (or run of tokens), and that of earlier turns where it is another. borrowed: the template closes
    no turn, so the token that opens the next one ends the answer (GLM). header: what opens an answer. generation: the template
    has `{% generation %}` blocks. specials finds a run of special tokens, `one` a
    single one.
    """

    ends: tuple[str, ...]
    borrowed: bool
    header: str
    generation: bool
    specials: re.Pattern[str]
    one: re.Pattern[str]

    def last_special(self, said: str, rest: str) -> int | None:
        """How much of the rest of a turn a tool call takes that ends with a token of its own (gpt-oss, Gemma 4).

        A token with a partner before it (`call_end` and `call_begin`) closes the call and not the turn: nothing would stop there.
        """
        found = list(self.specials.finditer(rest))
        if not found or found[-1].end() != len(rest.rstrip()):
            return None
        token = self.one.findall(found[-1][0])[-1]
        partners = {token.replace("/", ""), token.replace("end", "begin"), token.replace("end", "start"), _swapped(token)} - {token}
        return None if any(partner in said + rest for partner in partners) else found[-1].end()


def _swapped(token: str) -> str:
    """`<tool|>` for `<|tool>`, and the other way round."""
    return f"<|{token[1:-2]}>" if token.endswith("|>") and not token.startswith("<|") else token


def marks(renderer: Renderer, tokenizer: Any) -> Marks:
    """Probes a template. Raises `DataError` (`data.no-eot`, `data.template`) for one that does not end an answer."""
    tokens = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}, key=len, reverse=True)
    one = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
    run = re.compile(f"(?:{one.pattern})+")
    text, places = renderer.places([ASKED, ANSWERED])
    if [place.piece for place in places] != [Piece(0, "content", ASKED.content), Piece(1, "content", ANSWERED.content)]:
        raise unusable(renderer, "it does not write the words of both sides, once and in their order")
    lead, tail = text[places[0].stop : places[1].start], text[places[1].stop :]
    between, closing = _longer(renderer, lead)
    last, middle = run.search(tail), run.search(closing)
    here, there = (one.findall(found[0]) if found else [] for found in (last, middle))
    same = "".join(a for i, a in enumerate(here) if here[: i + 1] == there[: i + 1])
    borrowed = False
    if same:
        ends: tuple[str, ...] = (same,)
    elif here:
        # What follows an earlier answer is an end of its own only if it ends questions too; else it is the next header.
        ends = (here[0], there[0]) if there and lead.startswith(there[0]) else (here[0],)
    elif middle is not None and not (tail + closing[: middle.start()]).strip():
        ends, borrowed = (there[0],), True
    else:
        message = f"the chat template `{renderer.template.name}` writes no end-of-turn token after an answer"
        hint = "use `template: chatml`, `alpaca` or `plain`, or write {{ eos_token }} after the answer in your Jinja file"
        raise DataError(f"{message}: the model would never stop", hint=hint, code="data.no-eot")
    generation = GENERATION.search(renderer.template.text) is not None
    return Marks(ends, borrowed, _header(renderer, between), generation, run, one)


def _longer(renderer: Renderer, lead: str) -> tuple[str, str]:
    """What two turns have between question and answer in common, and what follows an answer that is not the last."""
    try:
        text, places = renderer.places([ASKED, ANSWERED, *AGAIN])
    except DataError:  # one turn is all that the template takes
        return lead, ""
    if len(places) != 4:
        return lead, ""
    return shared(lead, text[places[0].stop : places[1].start]), text[places[1].stop : places[2].start]


def _header(renderer: Renderer, between: str) -> str:
    """What opens an answer: what stands between question and answer, less what closes the question."""
    try:
        prompt, asked = renderer.places([ASKED], prompt=True)
        bare, alone = renderer.places([ASKED])
    except DataError:
        return ""
    if not asked or not alone:
        return ""
    opened, closed = prompt[asked[0].stop :], bare[alone[0].stop :]
    if opened == closed and between.startswith(opened) and between[len(opened) :].strip():
        raise unusable(renderer, f"an answer begins with {between[len(opened) :]!r}, which its generation prompt does not write")
    between = shared(between, opened)
    return EMPTY_THOUGHT.sub("", between[len(shared(between, closed)) :])


def unusable(renderer: Renderer, what: str) -> DataError:
    """The error for a template that no conversation can be rendered with."""
    hint = "use `template: chatml`, `alpaca` or `plain`, or mend the template"
    return DataError(f"the chat template `{renderer.template.name}` cannot be used: {what}", hint=hint, code="data.template")
