"""A recipe in the making: what the source says, what it becomes here, and one line of the report for every key.

Why a draft and not a dict: the promise of an import is that nothing is lost silently. Every key of the source ends in a line
that says what became of it, and so does every default that the source tool would have taken where ours is another.

    mapped    the same setting under our name
    derived   computed from one or more keys; `why` is the arithmetic
    default   not in the source; the tool's own default was written out, because ours is another
    differs   the tools behave differently and no key changes that
    ignored   has no effect on what is learned here, or is never imported (tokens, remote code, uploads)
    refused   asks for something that is not built; without it another model would be trained
    unknown   no key of the source tool
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from halfbyte.errors import RecipeError
from halfbyte.mistakes import nearest

Kind = Literal["mapped", "derived", "default", "differs", "ignored", "refused", "unknown"]
KINDS: tuple[Kind, ...] = ("mapped", "derived", "default", "differs", "ignored", "refused", "unknown")
HIDDEN = "(hidden)"
SILENT = "without effect beside the other settings"
_SECRET = re.compile(
    r"(^|[._])(hub|hf|ms|om|wandb|auth|access|api)_?(token|key)$|(^|\.)token$|password|secret|webhook|auth_token|(^|\.)env($|\.)"
)


@dataclass(frozen=True)
class Line:
    """What became of one or more keys of the source. values: theirs. to, result: our key and its value, if it has one."""

    kind: Kind
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    why: str = ""
    to: str = ""
    result: Any = None
    line: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if value not in ("", None, ())}

    def __str__(self) -> str:
        pairs = zip(self.keys, self.values, strict=True)
        said = ", ".join(f"{key}: {shown(value)}" if value is not None else key for key, value in pairs)
        became = f"{' -> ' if said else ''}{self.to}: {shown(self.result)}" if self.to else ""
        why = f" ({self.why})" if became and self.why else f": {self.why}" if said and self.why else self.why
        return f"{said}{became}{why}"


@dataclass
class Draft:
    """The recipe so far. source: the tool's keys with its hidden defaults filled in. given: keys that the source itself holds.

    where: the file, for errors. places: line of each key. folder: the file's directory. processes: training processes.
    written: the name that the source has for a key, where that is an older one.
    """

    tool: str
    where: str
    source: dict[str, Any]
    given: frozenset[str]
    places: Mapping[str, int] = field(default_factory=dict)
    folder: str = "."
    processes: int = 1
    extra: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The source's value, or the tool's default."""
        return self.source.get(key)

    def put(self, to: str, result: Any, *keys: str, why: str = "", values: Iterable[Any] | None = None) -> None:
        """Sets our key `to`. keys: the source's keys that it came from; where none of them is given it is the tool's default."""
        self.recipe[to] = result
        known = [key for key in keys if key in self.given or key not in self.source]
        kind: Kind = "default" if not known else "derived" if why else "mapped"
        told = tuple(values) if values is not None else tuple(self.get(key) for key in keys)
        self.lines.append(Line(kind, keys, told, why, to, result, self._line(keys)))

    def note(self, kind: Kind, why: str, *keys: str, value: Any = None) -> None:
        """A line that sets nothing. A key that the source does not hold (its default was refused or ignored) is no news."""
        if kind == "ignored" and keys and not any(key in self.given or key not in self.source for key in keys):
            return
        values = (value,) if value is not None else tuple(self.get(key) for key in keys)
        hidden = tuple(HIDDEN if is_secret(key) and v else v for key, v in zip(keys, values, strict=True))
        self.lines.append(Line(kind, keys, hidden, why, line=self._line(keys)))

    def _line(self, keys: Iterable[str]) -> int | None:
        return next((self.places[key] for key in keys if key in self.places), None)

    def number(self, key: str) -> float:
        """The value of `key` as a number. Raises RecipeError naming file, line and key."""
        return number(self.get(key), self.written.get(key, key), self.place(key))

    def whole(self, key: str) -> int:
        """The value of `key` as a whole number."""
        return whole(self.get(key), self.written.get(key, key), self.place(key))

    def sections(self, key: str) -> list[dict[str, Any]]:
        """The value of `key` as a list of sections; empty when it is."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise RecipeError(f"{self.place(key)}`{key}` must be a list of sections, but is {shown(value)}", code="import.value")
        return value

    def on(self, key: str) -> bool:
        """Whether a switch is set."""
        return is_on(self.get(key))

    def place(self, key: str) -> str:
        """`config.yml:12: `, for errors."""
        return f"{self.where}:{self.places[key]}: " if key in self.places else f"{self.where}: "

    def complete(self) -> None:
        """A line for keys that no rule had a word for: a rule may depend on other keys."""
        told = {key for line in self.lines for key in line.keys}
        for key in sorted(self.given - told - {key.partition(".")[0] for key in told}):
            self.note("ignored", SILENT, key)

    @property
    def refused(self) -> list[Line]:
        """What asks for something that is not built."""
        return [line for line in self.lines if line.kind == "refused"]


Rule = Callable[[Draft, str, Any], None]
Table = dict[str, Rule]


def to(path: str, convert: Callable[[Any, str, str], Any] | None = None) -> Rule:
    """The same setting under our name; `convert` turns (value, key, place) into ours."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value is None or value == "":
            draft.note("ignored", "empty in the source", key)
        else:
            draft.put(path, convert(value, key, draft.place(key)) if convert else value, key)

    return rule


def ignored(why: str) -> Rule:
    """Without effect on what is learned here."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        draft.note("ignored", "empty in the source" if value is None or value == "" else why, key)

    return rule


def refused(why: str, off: tuple[Any, ...] = ()) -> Rule:
    """Not built: refused when it is switched on, without a word when the tool's default leaves it off."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if not is_on(value) or value in off:
            draft.note("ignored", "off in the source, and not built here", key)
        else:
            draft.note("refused", why, key)

    return rule


def differs(why: str) -> Rule:
    """Switched on, it has no counterpart here, and the rest of the run stands."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        draft.note("differs" if is_on(value) else "ignored", why if is_on(value) else "off in the source", key)

    return rule


def read_with(other: str) -> Rule:
    """Told by the rule of another key, which is always there (it has a default)."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        told = any(key in line.keys for line in draft.lines)
        if not told:
            draft.note("ignored", f"read with `{other}`", key)

    return rule


def all_of(make: Callable[[str], Rule], why: str, keys: str) -> Table:
    """The same rule for several keys, separated by spaces."""
    return {key: make(why) for key in keys.split()}


def section(table: Table) -> Rule:
    """A key whose value is a section of keys with rules of their own, reported as `key.inner`."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if not isinstance(value, dict):
            draft.note("ignored", "empty in the source" if not value else "expected a section of keys", key)
            return
        for inner, given in value.items():
            dotted = f"{key}.{inner}"
            draft.source[dotted] = given
            draft.given |= {dotted}
            if inner in table:
                table[inner](draft, dotted, given)
            else:
                unknown(draft, dotted, inner, table)
        if not value:
            draft.note("ignored", "empty in the source", key)

    return rule


def opened(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a source, empty where there is none. Raises RecipeError for what is none."""
    found = source.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise RecipeError(f"`{name}` must be a section of `key: value` lines, but is {repr(found)[:80]}", code="import.source")
    return found or {}


def unknown(draft: Draft, dotted: str, name: str, table: Mapping[str, Any]) -> None:
    """A key that the tool does not know, with the nearest one that it does."""
    guess = nearest(name, table)
    hint = f"; did you mean `{guess}`?" if guess else ""
    doubtful = is_secret(dotted) or re.search("token|key|secret|auth", dotted.lower())
    draft.note("unknown", f"no key of {draft.tool} that is known here{hint}", dotted, value=HIDDEN if doubtful else None)


def number(value: Any, key: str, place: str) -> float:
    """A number, written as one or as text (`2e-4` is text to YAML 1.1). Raises RecipeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise RecipeError(f"{place}`{key}` must be a number, but is {shown(value)}", code="import.value")
    try:
        found = float(value) if isinstance(value, str) else value
    except ValueError:
        raise RecipeError(f"{place}`{key}` must be a number, but is `{value}`", code="import.value") from None
    if not math.isfinite(found):
        raise RecipeError(f"{place}`{key}` must be a finite number", code="import.value")
    return found


def whole(value: Any, key: str, place: str) -> int:
    """A whole number."""
    found = number(value, key, place)
    if found != int(found):
        raise RecipeError(f"{place}`{key}` must be a whole number, but is {shown(value)}", code="import.value")
    return int(found)


def text(value: Any, key: str, place: str) -> str:
    """Text as it stands."""
    if isinstance(value, dict | list):
        raise RecipeError(f"{place}`{key}` must be text, but is {shown(value)}", code="import.value")
    return str(value)


def switch(value: Any, key: str, place: str) -> bool:
    """true or false."""
    return is_on(value)


def words(value: Any) -> list[str]:
    """A list of names, or names separated by commas or spaces."""
    if isinstance(value, list):
        return [str(entry) for entry in value]
    return [part for part in str(value).replace(",", " ").split() if part] if value is not None else []


def is_on(value: Any) -> bool:
    """Whether a value switches something on: YAML 1.1's words and command lines' count."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "false", "no", "off", "none", "null", "0", "f", "n")
    return bool(value)


def is_secret(key: str) -> bool:
    """Whether a key may hold something that nobody else should read; its value is never printed."""
    return _SECRET.search(key.lower()) is not None


def shown(value: Any) -> str:
    """A value as the report prints it, on one short line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    said = str(value).replace("\n", "\\n")
    return said if len(said) <= 100 else f"{said[:97]}..."
