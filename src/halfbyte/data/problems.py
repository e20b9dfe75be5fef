"""What is wrong with the data, collected: every mistake is named by file, line and field, and raised once.

Why collected: whoever mends a file of a million lines wants the list, not the first item of it. The first ten are shown with
the total. Cost: nothing when the data is right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from halfbyte.errors import DataError

SHOWN = 10
HINTS = {
    "data.bad-example": "mend these lines, or name the shape: `data.train: [{path: ..., shape: messages}]`",
    "data.bad-file": "a .jsonl file holds one JSON object a line; a .json file one array of objects, or one object a line",
    "data.tools": 'a call is `{"name": ..., "arguments": {...}}`, `tools` a list of JSON schemas with a `name`; mend these lines, '
    "or leave them out",
    "data.mask": "where the template strips thoughts from earlier turns: `data.loss_on: each` or `data.loss_on: last`; where it "
    "has no place for `reasoning_content`: <think>...</think> in the content; else another `data.template`, or `data.loss_on: all`",
    "data.template": "the chat template refused or dropped these messages; choose one that writes them (tool calls, system "
    "messages, this order of roles) with `data.template`, such as a Jinja file, or leave them out",
    "data.no-eot": "write the end-of-turn token after every answer in the template, or use `template: chatml`",
}


class Where(NamedTuple):
    """Where an example comes from: `chats.jsonl:12`, or `squad.parquet row 12` for files without lines."""

    file: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file} {self.unit} {self.line}"


class Problem(NamedTuple):
    """One mistake: `field` is empty when the whole line is meant. hint: what to do, where it is not what HINTS say of `code`."""

    where: Where
    field: str
    expected: str
    got: str
    code: str
    hint: str = ""

    def __str__(self) -> str:
        name = f"`{self.field}`: " if self.field else ""
        return f"{self.where}: {name}expected {self.expected}, got {self.got}"


@dataclass
class Problems:
    """A list of mistakes that ends in at most one `DataError`."""

    shown: list[Problem] = field(default_factory=list)
    total: int = 0
    keep: int = SHOWN  # how many are listed, when all are wanted
    skipped: Counter[str] = field(default_factory=Counter)  # why -> examples left out on purpose, for the report
    noted: Counter[str] = field(default_factory=Counter)  # what -> examples that are odd but learned, for the report

    def add(self, where: Where, name: str, expected: str, got: str, code: str = "data.bad-example", hint: str = "") -> None:
        """Notes a mistake; reading goes on."""
        self.total += 1
        if len(self.shown) < self.keep:
            self.shown.append(Problem(where, name, expected, got, code, hint))

    def merge(self, other: Problems) -> None:
        """Adds what was found in a later part of the same data."""
        self.total += other.total
        self.shown += other.shown[: max(0, SHOWN - len(self.shown))]
        self.skipped.update(other.skipped)
        self.noted.update(other.noted)

    def raise_any(self) -> None:
        """Raises one `DataError` with the first ten mistakes and the total, if there is any."""
        if not self.total:
            return
        lines = [f"  {problem}" for problem in self.shown[:SHOWN]]
        if self.total > SHOWN:
            lines.append(f"  ... and {self.total - SHOWN} more")
        count = "1 example is wrong" if self.total == 1 else f"{self.total} examples are wrong"
        first = self.shown[0]
        raise DataError("\n".join([f"{count}:", *lines]), hint=first.hint or HINTS.get(first.code, ""), code=first.code)


def kind_of(value: object) -> str:
    """A value as an error message shows it: its type, and its text when that is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, str):
        return "an empty string" if not value.strip() else f"the text {value[:40]!r}"
    names = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
