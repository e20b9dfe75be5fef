"""One pass over the examples of a source as they are read: what is wrong with lines, fields, turns and text.

Why a pass of its own: the text is gone once tokens are made, and a list of all mistakes must not end at the first. The result is
kept beside the tokens under the digest of the source and the options, so that a second run reads a small file instead. Cost: about
60 microseconds an example the first time; above `most` examples every second, third, ... is looked at, and that is said.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from halfbyte.cachefile import replacing
from halfbyte.data import shapes
from halfbyte.data import tokens as store
from halfbyte.data.check import preferences
from halfbyte.data.check.findings import KEPT
from halfbyte.data.check.texts import Tests
from halfbyte.data.config import SourceConfig
from halfbyte.data.problems import Problem, Problems, Where
from halfbyte.data.sources import Record, Source, open_source
from halfbyte.errors import DataError

UNANSWERED = ("no answer by the assistant", "an empty answer", "empty text")
VERSION = 1  # raise it when a test changes
LISTED = 100_000  # mistakes that are listed one by one
ABSURD, PLENTY = 50, 20_000  # a message so many times the median length, and at least so many characters long


@dataclass
class Scan:
    """What was found in one source. counts: id -> examples; where: id -> the first places; problems: lines that are wrong."""

    name: str
    examples: int = 0
    looked: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    where: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    wrong: int = 0
    error: tuple[str, str, str] | None = None  # code, message, hint: what ended the reading
    details: dict[str, str] = field(default_factory=dict)

    def hit(self, name: str, where: object) -> None:
        """Counts an example."""
        self.counts[name] += 1
        places = self.where.setdefault(name, [])
        if len(places) < KEPT:
            places.append(str(where))


def scan(config: SourceConfig, cache: Path, tests: Tests, options: dict[str, Any], most: int = 0) -> Scan:
    """Looks at a source, or remembers what an earlier look found. most: examples to look at (0: all). Raises nothing."""
    try:
        source = open_source(config, cache)
    except DataError as error:
        return Scan(config.path, error=(error.code, error.message, error.hint))
    key = store.key_of({"scan": VERSION, "source": source.digest, "of": config.model_dump(mode="json"), "most": most, **options})
    file = cache / "checks" / f"{key}.json"
    if file.exists():
        return _loaded(file)
    found = _look(config, source, tests, most)
    with replacing(file) as stream:
        stream.write(json.dumps(vars(found)).encode())
    return found


def _loaded(file: Path) -> Scan:
    data = json.loads(file.read_text(encoding="utf-8"))
    problems = [Problem(Where(*p[0]), *p[1:]) for p in data.pop("problems")]
    error = data.pop("error")
    return Scan(**data | {"counts": Counter(data["counts"])}, problems=problems, error=tuple(error) if error else None)


class _Look:
    """One pass: counts into a `Scan` what each record shows."""

    def __init__(self, config: SourceConfig, name: str, tests: Tests, most: int) -> None:
        self.config, self.tests, self.most = config, tests, most
        self.found = Scan(name)
        self.problems = Problems(keep=LISTED)
        self.reader: shapes.Reader | None = None
        self.labels: preferences.Labels | None = None
        self.sizes = array("q")  # characters of the longest message of each dialogue
        self.large: list[tuple[int, str]] = []

    def start(self, first: Record) -> None:
        """Finds out what the records are."""
        if preferences.is_preference(first.data):
            self.labels = preferences.Labels()
        try:
            self.reader = shapes.reader(self.config.shape, first, shapes.layout(self.config))
        except DataError as error:
            self.found.error = (error.code, error.message, error.hint)

    def record(self, record: Record) -> None:
        """Reads and tests one record."""
        if self.labels is not None:
            self.labels.add(record)
        if self.reader is None:
            return
        self.found.looked += 1
        skipped = self.unanswered()
        example = self.reader.read(record, self.problems)
        if example is None:
            if self.unanswered() > skipped:
                self.found.hit("data.no-answer", record.where)
            return
        for name in self.tests(example):
            self.found.hit(name, record.where)
        if example.messages:
            self.sizes.append(size := max(len(m.content) for m in example.messages))
            if size >= PLENTY:
                self.large.append((size, str(record.where)))

    def unanswered(self) -> int:
        """Examples left out so far for want of an answer; others are left out on purpose."""
        return sum(self.problems.skipped[why] for why in UNANSWERED)

    def end(self) -> Scan:
        """What was found."""
        found = self.found
        found.problems, found.wrong = self.problems.shown, self.problems.total
        if "data.no-answer" in found.counts:
            reasons = [f"{why} ({n:,})" for why, n in sorted(self.problems.skipped.items()) if why in UNANSWERED]
            found.details["data.no-answer"] = f"left out: {', '.join(reasons)}"
        usual = median(self.sizes) if self.sizes else 0
        for size, where in self.large:
            if size > ABSURD * usual:
                found.hit("data.length", f"{where} ({size:,} characters)")
        if "data.length" in found.counts:
            found.details["data.length"] = f"a message more than {ABSURD} times as long as usual ({usual:,.0f} characters)"
        if self.labels is not None:
            for where in self.labels.same:
                found.hit("data.same-pair", where)
            for name, (count, words) in self.labels.shares().items():
                found.counts[name], found.details[name] = count, words
        return found


def _look(config: SourceConfig, source: Source, tests: Tests, most: int) -> Scan:
    look = _Look(config, source.name, tests, most)
    found, stride = look.found, 1
    try:
        for record in islice(source.read(look.problems), config.limit):
            if not found.examples:
                look.start(record)
            if most and found.looked >= most * stride:
                stride *= 2
            if found.examples % stride == 0:
                look.record(record)
            found.examples += 1
    except DataError as error:
        found.error = (error.code, error.message, error.hint)
    if not found.examples and not look.problems.total and found.error is None:
        found.error = ("data.empty", f"`{config.path}` is empty", "it must hold at least one example")
    return look.end()
