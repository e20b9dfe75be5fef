"""pydantic's findings as sentences: what is wrong, where, and the nearest name that would be right.

Why: a recipe is written by hand, so that its mistakes are the first thing a newcomer meets. pydantic reports one entry for
each branch of a union and speaks of types; here every mistake is one sentence with the dotted key, and all are told at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

CONTRADICTION = "halfbyte_contradiction"
Path = tuple[str | int, ...]

ELSEWHERE = {
    "base_model": "model",
    "model_name_or_path": "model",
    "load_in_4bit": "format: nf4",
    "load_in_8bit": "format: int8",
    "bnb_4bit_quant_type": "format.kind",
    "bnb_4bit_use_double_quant": "format.nested",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "datasets": "data.train",
    "dataset": "data.train",
    "val_set_size": "data.eval",
    "chat_template": "data.template",
    "sequence_len": "data.tokens",
    "cutoff_len": "data.tokens",
    "max_length": "data.tokens",
    "max_seq_length": "data.tokens",
    "learning_rate": "train.lr",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_grad_norm": "train.clip",
    "optimizer": "optim",
    "gradient_accumulation_steps": "train.batch (the effective batch; the plan splits it)",
    "micro_batch_size": "memory.microbatch",
    "per_device_train_batch_size": "memory.microbatch",
    "gradient_checkpointing": "memory.recompute",
    "output_dir": "output",
}
"""What other trainers call it, and what it is called here."""

_PHRASES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
    "string_too_short": "not empty",
    "too_short": "a list with at least one entry",
}
_BOUNDS = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt"), "less_than": ("less than", "lt")}
_BOUNDS["less_than_equal"] = ("at most", "le")


@dataclass(frozen=True)
class Mistake:
    """One mistake: where in the recipe, what is wrong, and what to do (may be empty)."""

    path: Path
    message: str
    hint: str = ""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that `name` probably meant, or None."""
    found = difflib.get_close_matches(name.lower(), list(options), n=1, cutoff=0.6)
    return found[0] if found else None


def dotted(path: Path) -> str:
    """`("data", "train", 0)` as a user writes it: `data.train.0`."""
    return ".".join(map(str, path))


def in_words(error: ValidationError, data: Any, root: type[BaseModel]) -> list[Mistake]:
    """Every finding about `data` (what was validated as `root`) as a sentence; the branches of a union become one."""
    mistakes: list[Mistake] = []
    wrong: dict[Path, list[dict[str, Any]]] = {}
    for found in error.errors(include_url=False):
        entry: dict[str, Any] = dict(found)
        path = _path_in_data(found["loc"], data, found["type"])
        if entry["type"] == CONTRADICTION:
            mistakes += [Mistake(tuple(key.split(".")), f"`{key}`: {why}") for key, why in entry["ctx"]["mistakes"]]
        elif entry["type"] == "extra_forbidden":
            mistakes.append(_unknown(path, root))
        elif entry["type"] == "missing":
            mistakes.append(Mistake(path, f"`{dotted(path)}` is missing"))
        elif entry["type"] == "value_error":
            mistakes.append(Mistake(path, f"`{dotted(path)}`: {entry['ctx']['error']}"))
        else:
            wrong.setdefault(path, []).append(entry)
    places = set(wrong) | {m.path for m in mistakes}
    for path, entries in wrong.items():
        # The branch of a union that was followed deeper is the one that was meant: its own finding says more.
        if not any(len(p) > len(path) and p[: len(path)] == path for p in places):
            mistakes.append(_wrong(path, entries))
    return mistakes


def _path_in_data(loc: Path, data: Any, kind: str) -> Path:
    """pydantic's location without the names of union branches."""
    path: list[str | int] = []
    for i, step in enumerate(loc):
        if isinstance(data, dict) and (step in data or (i == len(loc) - 1 and kind == "missing")):
            path.append(step)
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            path.append(step)
            data = data[step]
    return tuple(path)


def _phrase(entry: dict[str, Any]) -> str:
    """What the value must be, to follow "must be"."""
    kind = entry["type"]
    if kind == "literal_error":
        options = _choices(entry)
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{word} {entry['ctx'][key]:g}"
    return _PHRASES.get(kind, str(entry["msg"]))


def _choices(entry: dict[str, Any]) -> list[str]:
    if entry["type"] != "literal_error":
        return []
    return [c.strip().strip("'") for c in entry["ctx"]["expected"].replace(" or ", ", ").split(",")]


def _wrong(path: Path, entries: list[dict[str, Any]]) -> Mistake:
    phrase = ", or ".join(dict.fromkeys(_phrase(e) for e in entries))
    value = entries[0]["input"]
    hint = ""
    if isinstance(value, str):
        if guess := nearest(value, [c for e in entries for c in _choices(e)]):
            hint = f"did you mean `{guess}`?"
        elif "number" in phrase and value.replace(".", "", 1).lstrip("+-").isdigit():
            hint = "take away the quotes"
    return Mistake(path, f"`{dotted(path)}` must be {phrase}, but is {_said(value)}", hint)


def _said(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    return str(value)


def _unknown(path: Path, root: type[BaseModel]) -> Mistake:
    """An unknown key, with the nearest key beside it, or the place where that key lives, or its name here."""
    key = str(path[-1])
    here = _section(root, path[:-1])
    message = f"unknown key `{dotted(path)}`"
    if here is not None and (guess := nearest(key, here.model_fields)):
        return Mistake(path, message, f"did you mean `{dotted((*path[:-1], guess))}`?")
    if key in ELSEWHERE:
        return Mistake(path, message, f"it is called `{ELSEWHERE[key]}` here")
    everywhere = {name.rsplit(".", 1)[-1]: name for name in keys(root)}
    if guess := nearest(key, everywhere):
        return Mistake(path, message, f"did you mean `{everywhere[guess]}`?")
    known = ", ".join(here.model_fields) if here is not None else ""
    return Mistake(path, message, f"known keys here: {known}" if known else "")


def keys(root: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a section and the sections in it (list entries without their index)."""
    found: list[str] = []
    for name, field in root.model_fields.items():
        found.append(prefix + name)
        for section in sections_of(field.annotation):
            found += keys(section, f"{prefix}{name}.")
    return found


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type mentions: itself, or inside a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [s for inner in get_args(annotation) for s in sections_of(inner)]


def _section(root: type[BaseModel], path: Path) -> type[BaseModel] | None:
    for step in path:
        if isinstance(step, str):
            inner = sections_of(root.model_fields[step].annotation) if step in root.model_fields else []
            if not inner:
                return None
            root = inner[0]
    return root
