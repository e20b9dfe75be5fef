"""Recipes from YAML: every mistake at once, each with its file, line and nearest right name.

Why not `yaml.safe_load` alone: it keeps the last of two equal keys silently, forgets line numbers, reads `2e-4` as text and
`on` as true, and expands aliases without bound. The loader below is PyYAML's safe one with YAML 1.2's plain scalars
(null, true/false, numbers); aliases are refused, and so is a file of more than 1 MB.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import ValidationError

from halfbyte.config import SHORT, Recipe
from halfbyte.errors import RecipeError
from halfbyte.mistakes import Mistake, Path, dotted, in_words

MAX_BYTES = 1_000_000
TAGS = ("map", "seq", "str", "int", "float", "bool", "null")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE),
    list("-+0123456789."),
)
# fullmatch: the resolver calls `match`, so every pattern is anchored at its end.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, re.compile(f"(?:{pattern.pattern})$", pattern.flags)) for tag, pattern in entries]
    for first, entries in _Loader.yaml_implicit_resolvers.items()
}


@dataclass
class Document:
    """A YAML document as plain data, where each key stands, and the mistakes found on the way."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Path, int] = field(default_factory=dict)
    overrides: dict[Path, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def load_recipe(path: str | FilePath, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides such as `train.lr=1e-4` or `data.train.0.weight=2` applied.

    Raises RecipeError that names file, line and key of every mistake.
    """
    file = FilePath(path)
    text = _read(file)
    return _build(parse(text, str(path)), overrides, str(path))


def recipe_from(data: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a dict of sections, with the same overrides and the same errors (without lines)."""
    return _build(Document(data=_copy(data)), overrides, "")


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default spelt out; reads back as the same recipe."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))


def _build(document: Document, overrides: Sequence[str], where: str) -> Recipe:
    for override in overrides:
        _override(document, override)
    try:
        recipe = Recipe.__pydantic_validator__.validate_python(document.data)
    except RecipeError as error:
        assert isinstance(error.__cause__, ValidationError)
        raise _error(document, in_words(error.__cause__, document.data, Recipe), where) from error
    if document.mistakes:
        raise _error(document, [], where)
    assert isinstance(recipe, Recipe)
    return recipe


def _error(document: Document, found: list[Mistake], where: str) -> RecipeError:
    """One error of all mistakes, in the order of their lines; a single one carries its hint apart."""
    told = []
    for mistake in sorted(document.mistakes + found, key=lambda m: _line(document, m.path) or 0):
        source = next((text for key, text in document.overrides.items() if mistake.path[: len(key)] == key), "")
        line = _line(document, mistake.path)
        place = f"override `{source}`: " if source else f"{where}:{line}: " if line else f"{where}: " if where else ""
        told.append((place + mistake.message, mistake.hint))
    if len(told) == 1:
        return RecipeError(told[0][0], hint=told[0][1], code="recipe.invalid")
    lines = [f"  {message}{f'; {hint}' if hint else ''}" for message, hint in told]
    return RecipeError(f"{len(told)} mistakes{f' in {where}' if where else ''}:\n" + "\n".join(lines), code="recipe.invalid")


def _line(document: Document, path: Path) -> int | None:
    """Line of a key, or of the nearest section around it."""
    while path and path not in document.lines:
        path = path[:-1]
    return document.lines.get(path)


def _read(file: FilePath) -> str:
    if not os.path.exists(file):  # False for a name that no file can have, where Path.exists raises
        near = [f.name for f in sorted(file.parent.glob("*.y*ml"))] if os.path.isdir(file.parent) else []
        hint = f"recipes there: {', '.join(near[:8])}" if near else "`halfbyte init` writes one"
        raise RecipeError(f"there is no recipe {file}", hint=hint, code="recipe.missing")
    if not file.is_file():
        raise RecipeError(f"{file} is not a file", code="recipe.missing")
    if file.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{file} is larger than {MAX_BYTES:,} bytes", hint="is this a recipe?", code="recipe.size")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8 text", hint="is this a recipe?", code="recipe.encoding") from error


def parse(text: str, where: str) -> Document:
    """A YAML text as data, with the line of each key and what is wrong with it. Raises RecipeError for what is no such text."""
    try:
        loader = _Loader(text)
        if alias := next((t for t in yaml.scan(text, Loader=_Loader) if isinstance(t, yaml.AliasToken)), None):
            line = alias.start_mark.line + 1
            raise RecipeError(f"{where}:{line}: aliases (`*{alias.value}`) are not allowed", hint="write it out")
        node = loader.get_single_node()
        document = Document()
        if node is None:
            raise RecipeError(f"{where} is empty", hint="`halfbyte init` writes a recipe", code="recipe.empty")
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{where}:{node.start_mark.line + 1}: expected a list of `key: value` lines", code="recipe.yaml")
        document.data = _plain(loader, node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        hint = "indent with spaces" if "\\t" in str(error.problem) else "quote text that holds `: ` or starts with a sign"
        raise RecipeError(
            f"{where}:{line}: not valid YAML: {error.problem or error.context}", hint=hint, code="recipe.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}", code="recipe.yaml") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: not valid YAML: brackets nested too deeply", code="recipe.yaml") from error
    loader.dispose()
    return document


def _plain(loader: _Loader, node: yaml.Node, path: Path, document: Document) -> Any:
    """A YAML node as dicts, lists and scalars; notes the line of each key and every duplicate."""
    if node.tag.rpartition(":")[2] not in TAGS:
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not allowed", problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            line = key_node.start_mark.line + 1
            here = (*path, key)
            if key in data:
                first = document.lines[here]
                document.mistakes.append(Mistake((*here, "\0"), f"`{dotted(here)}` is given twice (first on line {first})"))
                document.lines[(*here, "\0")] = line
                continue
            document.lines[here] = line
            data[key] = _plain(loader, value_node, here, document)
        return data
    if isinstance(node, yaml.SequenceNode):
        entries = []
        for i, entry in enumerate(node.value):
            document.lines[(*path, i)] = entry.start_mark.line + 1
            entries.append(_plain(loader, entry, (*path, i), document))
        return entries
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, KeyError) as error:  # `!!int two`, or more digits than Python makes a number of
        problem = f"`{str(node.value)[:40]}` is not {node.tag.rpartition(':')[2]}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def _override(document: Document, text: str) -> None:
    """Applies `key.key=value`; the value is read as YAML. A list is reached by index, a one-word section is unfolded."""
    name, sign, value = text.partition("=")
    path: Path = tuple(int(step) if step.isdecimal() and len(step) < 9 else step for step in name.strip().split("."))
    if not sign or not all(step != "" for step in path):
        document.mistakes.append(Mistake((), f"override `{text}` is not of the form key=value", "for example train.lr=1e-4"))
        return
    document.overrides[path] = text
    data: Any = document.data
    for depth, key in enumerate(path[:-1]):
        step = key if isinstance(data, list) else str(key)
        inner = data[step] if _has(data, step) else None
        if depth == 0 and step in SHORT and isinstance(inner, str):
            inner = {SHORT[step]: inner}
        elif path[: depth + 1] in (("data", "train"), ("data", "eval")) and isinstance(inner, str):
            inner = [inner]
        elif path[:depth] in (("data", "train"), ("data", "eval")) and isinstance(inner, str):
            inner = {"path": inner}
        if not isinstance(inner, dict | list):
            inner = {}
        if not _put(data, step, inner):
            break
        data = data[step]
    else:
        if _put(data, path[-1], _value(text, value)):
            return
    document.mistakes.append(
        Mistake(path, f"there is no `{dotted(path)}`", "list entries count from 0, and only existing ones can be changed")
    )


def _has(data: Any, step: str | int) -> bool:
    return step in data if isinstance(data, dict) else isinstance(step, int) and step < len(data)


def _put(data: Any, step: str | int, value: Any) -> bool:
    """Sets a key of a section or an existing entry of a list; False when there is no such place."""
    if isinstance(data, list) and not _has(data, step):
        return False
    data[step if isinstance(data, list) else str(step)] = value
    return True


def _value(text: str, value: str) -> Any:
    try:
        return yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        raise RecipeError(f"override `{text[:80]}`: the value is not valid YAML", hint="quote it", code="recipe.yaml") from error


def _copy(data: Any) -> Any:
    """Deep copy of dicts and lists, so that overrides never change the caller's."""
    if isinstance(data, dict):
        return {k: _copy(v) for k, v in data.items()}
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        return [_copy(v) for v in data]
    return data
