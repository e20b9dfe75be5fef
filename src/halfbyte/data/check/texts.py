"""What can be wrong with the text of one example, before any token is made.

Each test is a small function of strings, tuned on public sets so that ordinary prose, code and Chinese pass. Sources: mojibake
is told by ftfy's heuristic (R. Speer, 2019), whose false positives are rare by design; repetition by how far zlib compresses a
text (below a tenth, no prose gets there). Cost: about 20 microseconds an example.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from ftfy import badness

from halfbyte.data.shapes import Example

CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufdd0-\ufdef\ufeff\ufffe\uffff\ud800-\udfff]")
SUSPECT = re.compile("[\u0080-\u04ff][^\x00-\x7f]")  # wrongly decoded bytes stand beside one another
FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|im_sep|eot_id|eom_id|start_header_id|end_header_id|endoftext|begin_of_text|end_of_text|user|assistant"
    r"|system|end|end_of_turn|observation|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN)\|>|</s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|\[gMASK\]|<\uff5c[^\uff5c>]{2,30}\uff5c>"
)
HEADINGS = re.compile(
    r"^(?:### (?:Instruction|Human|User):?.*?^### (?:Response|Assistant)"
    r"|(?:Human|User|USER): .*?^(?:Assistant|AI|ASSISTANT): .*?^(?:Human|User|USER): )", re.S | re.M
)  # fmt: skip
BLANK = re.compile(r"\{\{ ?[A-Za-z_]\w{0,30} ?\}\}")
ENTITY = re.compile(r"&amp;(?:#?\w{2,6});|&(?:quot|nbsp|#39|#x27|apos);")
BLOB = re.compile(r"[A-Za-z0-9+/]{300,}|(?:[0-9a-fA-F]{2}[ :,]){200,}")
FENCED = re.compile(r"```.*?(?:```|\Z)", re.S)
LONG = 1500  # characters from which compression tells anything
RATIO = 0.08
WORDLESS = 0.3  # share of letters and digits among what is not space


def special_tokens(tokenizer: Any) -> list[str]:
    """Every special token of a tokenizer as text: the named ones, and what was added as special."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return sorted(filter(None, {*tokenizer.all_special_tokens, *added}))


def damaged(text: str) -> bool:
    """Whether the text looks decoded with the wrong encoding."""
    return not text.isascii() and SUSPECT.search(text) is not None and bool(badness.is_bad(text))


def repeated(text: str) -> bool:
    """Whether a text of more than `LONG` characters compresses below `RATIO`."""
    return len(text) > LONG and len(zlib.compress(raw := text.encode(errors="replace"), 1)) < RATIO * len(raw)


def wordless(text: str) -> bool:
    """Whether it holds a blob, or is a long text of symbols mostly."""
    if BLOB.search(text):
        return True
    dense = "".join(FENCED.sub("", text).split())  # drawings stand in fences
    return len(dense) > 200 and sum(map(str.isalnum, dense)) < WORDLESS * len(dense)


def escaped(text: str) -> bool:
    """Whether line breaks were escaped twice: several written out and not one real."""
    return "\n" not in text and text.count("\\n") >= 2 and len(text) > 40


_ANY: dict[str, Callable[[str], object]] = {
    "data.damaged-text": damaged,
    "data.lost-characters": lambda text: "\ufffd" in text,
    "data.control": CONTROL.search,
    "data.entities": ENTITY.search,
    "data.repetition": repeated,
    "data.non-text": wordless,
}
_EACH: dict[str, Callable[[str], object]] = {
    "data.escaped": escaped,
    "data.rendered": HEADINGS.search,
    "data.placeholder": BLANK.search,
}


class Tests:
    """The tests of one run: `special` finds the tokenizer's own special tokens (None: no tokenizer)."""

    def __init__(self, special: Sequence[str] = (), private: bool = False) -> None:
        self._special = re.compile("|".join(sorted(map(re.escape, filter(None, special)), key=len, reverse=True)) or "(?!)")
        self._private = private

    def __call__(self, example: Example) -> Iterator[str]:
        """The ids of what is wrong with an example."""
        chat = example.messages
        parts = [m.content for m in chat] or [example.prompt, example.text]
        whole = "\n".join(parts)
        yield from (name for name, test in _ANY.items() if test(whole))
        if self._special.search(whole):
            yield "data.special-in-text"
        if FOREIGN.search(self._special.sub("", whole)):
            yield "data.foreign-special"
        if self._private:
            from halfbyte.data.check import private

            yield from private.found(whole)
        if example.text and not example.prompt:
            return  # what follows is about dialogues: plain text may hold anything
        yield from (name for name, test in _EACH.items() if any(test(p) for p in parts))
        yield from _turns(example)


def _turns(example: Example) -> Iterator[str]:
    chat = example.messages
    if not chat:
        if not example.prompt.strip():
            yield "data.empty-question"
        elif example.prompt.strip() == example.text.strip():
            yield "data.echo"
        return
    asked = [m for m in chat if m.role in ("user", "system")]
    if any(not m.content.strip() for m in asked):
        yield "data.empty-question"
    if _disorder([m.role for m in chat]):
        yield "data.role-order"
    pairs = pairwise(chat)
    if any(b.role == "assistant" and a.role == "user" and a.content.strip() == b.content.strip() != "" for a, b in pairs):
        yield "data.echo"


def _disorder(roles: list[str]) -> bool:
    """A system message that is not first, a speaker twice in a row, an opening answer, or a question left open."""
    talk = [r for r in roles if r in ("user", "assistant")]
    late = "system" in roles[1:]
    twice = any(a == b for a, b in pairwise(talk)) and not {"tool"} & set(roles)
    return late or twice or talk[:1] == ["assistant"] or talk[-1:] == ["user"]
