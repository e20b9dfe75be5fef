"""`--fix`: repairs what has one right answer, into a new file, and says what it changed, line by line.

    line       a byte order mark, a comma after the object, brackets around the lines, two objects on one line, a Python dict
    field      messages written as JSON text; roles in another case or by a known other name; numbers in place of text
    text       mojibake that ftfy undoes without a trace left; control characters; special tokens at the ends of a message
    example    an exact copy of an earlier one

Why so little: a guess would be learned. What stays wrong is left out of the new file, counted, and can be had with `--bad`. Cost:
one pass over the source.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftfy import fix_encoding

from halfbyte.data import shapes
from halfbyte.data.check import lines, texts
from halfbyte.data.config import SourceConfig
from halfbyte.data.problems import Problems, Where
from halfbyte.data.sources import Record, open_source
from halfbyte.data.turns import ROLES
from halfbyte.errors import DataError

NAMES = {"ai": "assistant", "chatbot": "assistant", "answer": "assistant", "question": "user", "customer": "user", "person": "user"}
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
SHOWN = 3


@dataclass
class Repaired:
    """What was changed: kind -> places; written: examples in the new file; left_out: those that are still wrong."""

    file: str
    written: int = 0
    left_out: list[str] = field(default_factory=list)
    changes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, where: object) -> None:
        """Remembers a change."""
        self.changes.setdefault(kind, []).append(str(where))

    def lines(self) -> list[str]:
        """As a person reads it."""
        found = [f"{self.file}: {self.written:,} examples written"]
        for kind, places in [*sorted(self.changes.items()), ("still wrong, left out", self.left_out)]:
            more = f", and {len(places) - SHOWN:,} more" if len(places) > SHOWN else ""
            found += [f"  {len(places):,} x {kind}: {', '.join(places[:SHOWN])}{more}"] if places else []
        return found


def repair(config: SourceConfig, cache: Path, specials: list[str], out: Path) -> Repaired:
    """Writes a repaired copy of a source as JSON lines. Raises DataError (data.exists, data.not-found)."""
    done = Repaired(str(out))
    seen: dict[bytes, Where] = {}
    with lines.create(out) as stream:
        reader: shapes.Reader | None = None
        for record in _records(config, cache, done):
            data = _mend(record, specials, done)
            fixed = Record(record.where, data)
            reader = reader or shapes.reader(config.shape, fixed, shapes.layout(config))
            problems = Problems()
            if reader.read(fixed, problems) is None:
                done.left_out.append(str(problems.shown[0]) if problems.shown else f"{record.where}: {', '.join(problems.skipped)}")
                continue
            key = hashlib.blake2b(json.dumps(data, sort_keys=True, default=str).encode(errors="replace"), digest_size=16).digest()
            if key in seen:
                done.note("an exact copy left out", f"{record.where} = {seen[key]}")
                continue
            seen[key] = record.where
            stream.write(json.dumps(data, ensure_ascii=False, default=str).encode(errors="replace") + b"\n")
            done.written += 1
    return done


def _records(config: SourceConfig, cache: Path, done: Repaired) -> Iterator[Record]:
    """The records of a source; those of JSON lines from the raw lines, repaired where they need it."""
    problems = Problems(keep=1 << 30)
    source = open_source(config, cache)
    by_line: dict[str, set[int]] = {}
    yield from source.read(problems)
    for problem in problems.shown:
        if lines.is_lines(problem.where.file):
            by_line.setdefault(problem.where.file, set()).add(problem.where.line)
        else:
            done.left_out.append(str(problem))
    for file, wanted in by_line.items():
        for number, line in lines.raw(file):
            if number in wanted:
                yield from _line(Where(file, number), line, done)


def _line(where: Where, line: bytes, done: Repaired) -> Iterator[Record]:
    try:
        text = line.decode("utf-8-sig").strip().strip("\ufeff")
    except UnicodeDecodeError:
        done.left_out.append(f"{where}: not UTF-8")
        return
    if text in ("[", "]", "],", ","):
        done.note("a bracket around the lines taken out", where)
        return
    for kind, found in _readings(text):
        if found and all(isinstance(entry, dict) for entry in found):
            done.note(kind, where)
            yield from (Record(where, entry) for entry in found)
            return
    done.left_out.append(f"{where}: not a JSON object")


def _readings(text: str) -> Iterator[tuple[str, list[Any]]]:
    """Ways to read a broken line, the safest first."""
    bare = text.removeprefix("[").removesuffix("]") if text[:1] + text[-1:] in ("[{", "}]") else text
    yield "a comma or bracket beside an object taken out", _objects(bare.strip().rstrip(","))
    try:
        yield "a Python dict written as JSON", [ast.literal_eval(text.rstrip(","))]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return


def _objects(text: str) -> list[Any]:
    """Objects side by side, with or without commas between; none where anything else stands there."""
    decoder, found, at = json.JSONDecoder(strict=False), list[Any](), 0
    while at < len(text):
        try:
            entry, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            return []
        found.append(entry)
        while at < len(text) and text[at] in " \t,":
            at += 1
    return found


def _mend(record: Record, specials: list[str], done: Repaired) -> dict[str, Any]:
    data = dict(record.data)
    for name, value in data.items():
        if name in (*shapes.LISTS, "prompt", "completion", "chosen", "rejected"):
            data[name] = _turns(value, record.where, specials, done)
        elif name in ("instruction", "input", "output", "text", "system"):
            data[name] = _text(value, record.where, specials if name != "text" else [], done)
    return data


def _turns(value: Any, where: Where, specials: list[str], done: Repaired) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
            done.note("messages read out of JSON text", where)
        except json.JSONDecodeError:
            return value
    if not isinstance(value, list):
        return _text(value, where, specials, done)
    return [_turn(turn, where, specials, done) if isinstance(turn, Mapping) else turn for turn in value]


def _turn(turn: Mapping[str, Any], where: Where, specials: list[str], done: Repaired) -> dict[str, Any]:
    fixed = dict(turn)
    for key in ROLE_KEYS:
        role = fixed.get(key)
        if isinstance(role, str) and role.strip().lower() not in ROLES:
            plain = role.strip().rstrip(":").lower()
            plain = NAMES.get(plain, plain)
            if plain in ROLES:
                done.note(f"the role {role!r} written as {plain!r}", where)
                fixed[key] = plain
    for key in TEXT_KEYS:
        if key in fixed:
            fixed[key] = _text(fixed[key], where, specials, done)
    return fixed


def _text(value: Any, where: Where, specials: list[str], done: Repaired) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        done.note("a number written as text", where)
        return str(value)
    if not isinstance(value, str):
        return value
    if texts.damaged(value) and not texts.damaged(better := fix_encoding(value)) and better != value:
        done.note("mojibake undone", where)
        value = better
    if texts.CONTROL.search(value):
        done.note("control characters taken out", where)
        value = texts.CONTROL.sub("", value)
    return _trimmed(value, where, specials, done)


def _trimmed(text: str, where: Where, specials: list[str], done: Repaired) -> str:
    """Without the special tokens at its ends: the template writes them."""
    bare = text
    while token := next((s for s in specials if bare.strip().startswith(s) or bare.strip().endswith(s)), None):
        bare = bare.strip().removeprefix(token).removesuffix(token).strip()
    if bare != text and any(s in text for s in specials) and bare:
        done.note("special tokens at the ends of a message taken out", where)
        return bare
    return text


def outputs(out: Path, count: int) -> list[Path]:
    """A file for each of `count` sources: `fixed.jsonl`, or `fixed-1.jsonl`, `fixed-2.jsonl`, ..."""
    if out.suffix not in lines.LINES:
        raise DataError(f"`{out}`: repaired examples are written as JSON lines", hint="name a .jsonl file", code="data.exists")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{n + 1}") for n in range(count)]
