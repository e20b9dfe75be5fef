"""An import whole: source in, recipe and report out.

Order: the tool's hidden defaults are filled in under what the source says, every key passes through the tool's table, what the
tables cannot say is told as a difference, and the recipe is validated as `halfbyte train` would. Defaults that are ours as well
are not written, so that the recipe holds the source's settings and the differences, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from halfbyte.config import Recipe
from halfbyte.config_base import Section
from halfbyte.errors import RecipeError
from halfbyte.importers import axolotl, llamafactory, trainer_args, trl, unsloth
from halfbyte.importers.draft import KINDS, Draft, Kind, Line, Table, unknown
from halfbyte.importers.source import Source, read
from halfbyte.mistakes import sections_of
from halfbyte.recipe import recipe_from

NAMES = {"axolotl": "axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL", "unsloth": "Unsloth"}
HEADINGS: dict[Kind, str] = {
    "mapped": "mapped",
    "derived": "derived",
    "default": "not said in the source; its default is another than ours, and was written out",
    "differs": "different here, and no key changes it",
    "ignored": "ignored",
    "refused": "refused",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class Tool:
    """One tool: its name for people, its table, its hidden defaults, what no key of it says, and older names of its keys."""

    name: str
    table: Table
    defaults: dict[str, Any]
    differences: Callable[[Draft], None]
    older: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """What came of a source. recipe: nested sections, what was set only. lines: the report, in the order of `KINDS`."""

    tool: str
    reason: str
    where: str
    recipe: dict[str, Any]
    lines: tuple[Line, ...]

    def of(self, kind: Kind) -> list[Line]:
        """The report's lines of one kind."""
        return [line for line in self.lines if line.kind == kind]

    def yaml(self) -> str:
        """The recipe as a file."""
        body = yaml.dump(self.recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        head = f"# Written by `halfbyte import` from {self.where} ({NAMES[self.tool]}). Every key: docs/reference/recipe.md."
        return f"{head}\n{body}"

    def report(self) -> Iterator[str]:
        """The report for people, one line after another."""
        yield f"{self.where}: {NAMES[self.tool]} (by {self.reason})"
        for kind in KINDS:
            found = self.of(kind)
            empty = [line for line in found if line.why == "empty in the source"]
            if found:
                yield f"{HEADINGS[kind]}:"
            for line in found:
                if line not in empty:
                    yield f"  {f'line {line.line}: ' if line.line and kind in ('refused', 'unknown') else ''}{line}"
            if empty:
                yield f"  empty in the source: {', '.join(key for line in empty for key in line.keys)}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        lines = [line.as_dict() for line in self.lines]
        return {"tool": self.tool, "reason": self.reason, "source": self.where, "recipe": self.recipe, "report": lines}


def convert(given: list[str], tool: str = "", *, processes: int | None = None, dataset_info: str | None = None) -> Imported:
    """The recipe and the report of a source (a file, or a command line). Refusals are in the report, not raised.

    processes: training processes that the batch is counted for; what the source says, or 1. dataset_info: LLaMA-Factory's registry.
    Raises RecipeError (`import.*`) for a source that cannot be read, a value that is no value, or a recipe that contradicts itself.
    """
    return from_source(read(given, tool), processes=processes, dataset_info=dataset_info)


def from_source(source: Source, *, processes: int | None = None, dataset_info: str | None = None) -> Imported:
    """The same for a source that was read already."""
    chosen, data = _tool(source)
    data, written = _renamed(data, chosen.older)
    draft = Draft(
        tool=chosen.name,
        where=source.where,
        source=chosen.defaults | data,
        given=frozenset(data),
        places=source.lines | {new: source.lines[old] for new, old in written.items() if old in source.lines},
        folder=source.folder,
        processes=processes or source.processes or 1,
        extra={"dataset_info": dataset_info} if dataset_info else {},
        written=written,
    )
    for key in data:
        if key not in chosen.table:
            unknown(draft, key, key, chosen.table)
    for key, rule in chosen.table.items():
        if key in draft.source:
            rule(draft, key, draft.source[key])
    chosen.differences(draft)
    draft.complete()
    lines = _told(draft)
    recipe = _nested(draft.recipe, {line.to for line in lines})
    found = Imported(source.tool, source.reason, source.where, recipe, lines)
    if not draft.refused:
        recipe_from(recipe)
    return found


def _tool(source: Source) -> tuple[Tool, dict[str, Any]]:
    """The tool of a source, and the source's keys as its table knows them."""
    if source.tool == "axolotl":
        return Tool("axolotl", axolotl.TABLE, axolotl.DEFAULTS, axolotl.differences), source.data
    if source.tool == "llamafactory":
        older = trainer_args.OLDER
        return Tool("LLaMA-Factory", llamafactory.TABLE, llamafactory.DEFAULTS, llamafactory.differences, older), source.data
    if source.tool == "trl":
        return Tool("TRL", trl.TABLE, trl.defaults(source.data), trl.differences, trl.OLDER), trl.flattened(source.data)
    if source.tool == "unsloth":
        sections = any(name in source.data for name in unsloth.SECTIONS)
        return Tool(
            "Unsloth", unsloth.TABLE, unsloth.STUDIO if sections else unsloth.DEFAULTS, unsloth.differences
        ), unsloth.flattened(source.data)
    raise RecipeError(f"`--from {source.tool}` is none of {', '.join(NAMES)}", code="import.tool")


def _renamed(data: dict[str, Any], older: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys by their names of today, unless the source has that one too, and the name that it wrote for each renamed one."""
    written = {new: old for old, new in older.items() if data.get(old) is not None and new not in data}
    now = {old: new for new, old in written.items()}
    return {now.get(key, key): value for key, value in data.items()}, written


def _told(draft: Draft) -> tuple[Line, ...]:
    """The report: a later value for the same key of ours wins, and defaults that are ours as well are no news."""
    last = {line.to: line for line in draft.lines if line.to}
    lines = [line for line in draft.lines if not line.to or last[line.to] is line or line.kind != "default"]
    lines = [line for line in lines if line.kind != "default" or _ours(line.to) != line.result]
    lines = [replace(line, keys=tuple(draft.written.get(key, key) for key in line.keys)) for line in lines]
    return tuple(sorted(lines, key=lambda line: KINDS.index(line.kind)))


_MISSING = object()


def _ours(path: str) -> Any:
    """Our default of a key; `_MISSING` for one without."""
    section: type[Section] = Recipe
    *sections, leaf = path.split(".")
    for step in sections:
        if step.isdigit() or step not in section.model_fields:
            return _MISSING
        section = next(iter(sections_of(section.model_fields[step].annotation)), Section)  # type: ignore[assignment]
    field = section.model_fields.get(leaf)
    return _MISSING if field is None or field.is_required() else field.get_default(call_default_factory=True)


def _nested(flat: dict[str, Any], told: set[str]) -> dict[str, Any]:
    """Dotted keys as sections and lists, in the order of a recipe; only keys that the report tells."""
    nested: dict[str, Any] = {}
    for path in sorted((p for p in flat if p in told), key=_place):
        here: Any = nested
        *sections, leaf = path.split(".")
        for step in sections:
            here = here.setdefault(step, {})
        here[leaf] = flat[path]
    data = nested.get("data", {})
    for key in ("train", "eval"):
        if isinstance(data.get(key), dict):
            data[key] = list(data[key].values())
    for name, key in (("model", "name"), ("format", "kind")):
        if list(nested.get(name, {})) == [key]:
            nested[name] = nested[name][key]
    return nested


def _place(path: str) -> tuple[int, ...]:
    """Where a key stands in a recipe: sections and their keys in the order of their declaration."""
    section: type[Section] = Recipe
    found: list[int] = []
    for step in path.split("."):
        fields = list(section.model_fields)
        found.append(int(step) if step.isdigit() else fields.index(step) if step in fields else len(fields))
        if step in section.model_fields:
            section = next(iter(sections_of(section.model_fields[step].annotation)), section)  # type: ignore[assignment]
    return tuple(found)


class _Dumper(yaml.SafeDumper):
    """YAML that reads back as it was: numbers such as 2e-4 in YAML 1.2's spelling, words that look like numbers quoted."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    """2.0e-06, which every YAML reads as a number; 3 for 3.0."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return dumper.represent_scalar("tag:yaml.org,2002:int", str(int(value)))
    text = repr(value) if math.isfinite(value) else f".{value}"
    return dumper.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    looks = value.replace(".", "").replace("-", "").replace("+", "").replace("e", "").isdigit()
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if looks else None)


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    """Words side by side, sections one below the other."""
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=not any(isinstance(v, dict) for v in value))


_Dumper.add_representer(float, _float)
_Dumper.add_representer(list, _list)
_Dumper.add_representer(str, _text)
