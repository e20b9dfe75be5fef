"""Shapes: the few ways in which people write examples down, turned into one: messages, or plain text.

    messages            messages: [{role, content}, ...] [, tools, system]        (OpenAI)
    sharegpt            conversations: [{from, value}, ...] [, tools, system]     (ShareGPT, axolotl)
    alpaca              instruction, input, output [, history, system]            (Stanford Alpaca)
    prompt_completion   prompt, completion: both text, or both lists of messages
    text                text
    preference          chosen, rejected [, prompt or one of the above]           (DPO, ORPO: `preferences.py`)
    unpaired            completion and label [, prompt], or messages and label    (KTO)

Why recognised from the columns: nobody should register a file to learn from it; the choice is reported. What looks like
something that is not built (images) is an error, never half read. Text such as `{{name}}` is data: nothing is filled in. Cost:
microseconds a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from halfbyte.data import preferences
from halfbyte.data.config import SourceConfig
from halfbyte.data.problems import Problems, Where, kind_of
from halfbyte.data.sources import Record
from halfbyte.data.turns import ROLE_KEYS, USUAL, Example, Message, Role, Spelling, number, tools, turns
from halfbyte.errors import DataError

__all__ = ["Example", "Layout", "Message", "Reader", "Role", "layout", "reader"]

LISTS = ("messages", "conversations", "conversation")
CHAT = {*LISTS, "system", "tools"}
COLUMNS: dict[str, set[str]] = {
    "messages": CHAT,
    "sharegpt": CHAT,
    "alpaca": {"instruction", "input", "output", "history", "system"},
    "prompt_completion": {"prompt", "completion", "tools"},
    "text": {"text"},
    "preference": {"prompt", "question", "instruction", "input", "chosen", "rejected", *CHAT},
    "unpaired": {"prompt", "completion", "label", *CHAT},
}  # shape -> columns that are read


@dataclass(frozen=True)
class Layout:
    """How a source spells its columns and turns: what the recipe says of it. columns: our name -> the source's."""

    columns: tuple[tuple[str, str], ...] = ()
    spelling: Spelling = USUAL
    group: str = ""
    learn: str = "all"


PLAIN = Layout()
Read = Callable[[Record, Problems], Example | None]


class Reader(NamedTuple):
    """How one source is read: its shape, the columns that are not read, and the function from a record to an example."""

    shape: str
    ignored: tuple[str, ...]
    read: Read


def layout(config: SourceConfig) -> Layout:
    """What a source's section says of its columns and turns."""
    spelling = Spelling(config.keys.get("role", ""), config.keys.get("content", ""), tuple(sorted(config.roles.items())))
    return Layout(tuple(sorted(config.columns.items())), spelling, config.group or "", config.learn)


def _lacking(first: Record, key: str, names: list[str]) -> DataError:
    message = f"{first.where}: `{key}` names {', '.join(f'`{name}`' for name in names)}, which the first example lacks"
    return DataError(message, hint=f"its columns: {', '.join(map(str, first.data))}", code="data.shape")


def reader(shape: str, first: Record, layout: Layout = PLAIN) -> Reader:
    """The reader for a named shape, or for the one that the first record's columns show (`auto`).

    Raises `DataError` (`data.shape`) when the columns fit no shape, or fit one that is not built.
    """
    missing = [theirs for _, theirs in layout.columns if _find(first.data, theirs) is None and theirs not in first.data]
    if missing:
        raise _lacking(first, "columns", missing)
    if layout.group and _find(first.data, layout.group) is None and layout.group not in first.data:
        raise _lacking(first, "group", [layout.group])
    mapped = _mapped(first, layout)
    columns = set(mapped.data)
    shape = _recognise(mapped, columns) if shape == "auto" else shape
    if shape in ("preference", "unpaired") and layout.learn != "chosen":
        raise _not_built(first.where, shape)
    readers: dict[str, Callable[[Record, Problems, Spelling], Example | None]] = {
        "messages": _read_conversation, "sharegpt": _read_conversation, "alpaca": _read_alpaca,
        "prompt_completion": _read_completion, "text": _read_text,
        "preference": preferences.read_pair, "unpaired": preferences.read_label,
    }  # fmt: skip
    framed = bool(layout.group) or any(ours == "weight" for ours, _ in layout.columns)
    named = {ours for ours, _ in layout.columns} | {theirs.partition(".")[0] for _, theirs in layout.columns}
    read = COLUMNS[shape] | named | {layout.group}
    inner = readers[shape]

    def whole(record: Record, problems: Problems) -> Example | None:
        record = _mapped(record, layout)
        example = inner(record, problems, layout.spelling)
        if example is None or (example.weight and not framed):
            return example
        return _framed(example, record, layout, problems)

    return Reader(shape, tuple(sorted(columns - read)), whole)


def _not_built(where: Where, shape: str) -> DataError:
    what = "preference pairs (`chosen`, `rejected`)" if shape == "preference" else "answers marked good or bad (`label`, for KTO)"
    good = "the chosen answers" if shape == "preference" else "the good answers"
    hint = f"to learn {good} as usual: `{{path: ..., learn: chosen}}`; every answer as it stands: `{{path: ..., shape: messages}}`"
    return DataError(f"{where}: these are {what}; training on preferences is not built yet", hint=hint, code="data.shape")


def _find(data: Mapping[str, Any], name: str) -> Any:
    """A column, or `a.b` inside one."""
    if name in data:
        return data[name]
    found: Any = data
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _mapped(record: Record, layout: Layout) -> Record:
    if not layout.columns:
        return record
    theirs = {name for _, name in layout.columns}
    rest = {name: value for name, value in record.data.items() if name not in theirs}
    return Record(record.where, {**rest, **{ours: _find(record.data, name) for ours, name in layout.columns}})


def _framed(example: Example, record: Record, layout: Layout, problems: Problems) -> Example | None:
    """What belongs to the whole example: its weight, where a column was named for it, and its group."""
    weight: float | None = example.weight
    if any(ours == "weight" for ours, _ in layout.columns):
        weight = number(record.data.get("weight"), "weight", example.where, problems)
    group = _find(record.data, layout.group) if layout.group else ""
    if layout.group and (group is None or isinstance(group, list | dict)):
        problems.add(example.where, layout.group, "a group (text or a number)", kind_of(group))
        return None
    if weight is None:
        return None
    if weight == 0:
        problems.skipped["a weight of 0"] += 1
        return None
    if weight == example.weight and not layout.group:
        return example
    return Example(
        example.where, example.messages, example.learn_from, example.prompt, example.text, example.tools, weight, str(group)
    )


def _recognise(first: Record, columns: set[str]) -> str:
    where, data = first
    if {"images", "image", "videos", "audios", "audio"} & columns:
        raise DataError(f"{where}: images, video and sound are not built", hint="halfbyte learns from text", code="data.shape")
    if {"chosen", "rejected"} <= columns:
        return "preference"
    lists = [name for name in LISTS if isinstance(data.get(name), list)]
    if preferences.is_label(data.get("label")) and (lists or {"prompt", "completion"} <= columns):
        return "unpaired"
    if lists:
        conversation = data[lists[0]]
        first_turn = conversation[0] if conversation and isinstance(conversation[0], Mapping) else {}
        return "sharegpt" if first_turn.get(ROLE_KEYS[0]) is None and first_turn else "messages"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if "text" in columns:
        return "text"
    known = "messages | conversations | instruction + output | prompt + completion | chosen + rejected | text"
    message = f"{where}: no shape has the columns {', '.join(f'`{c}`' for c in sorted(map(str, columns))) or '(none)'}"
    raise DataError(message, hint=f"name them: `columns: {{messages: ...}}`; known: {known}", code="data.shape")


def _chat(
    where: Where, messages: tuple[Message, ...], problems: Problems, learn_from: int = 0, given: tuple[Mapping[str, Any], ...] = ()
) -> Example | None:
    """Leaves out, counted, what has nothing to learn: no answer at all, or an empty one."""
    answers = [m for m in messages[learn_from:] if m.role == "assistant"]
    if not answers:
        problems.skipped["no answer by the assistant"] += 1
    elif not any(m.weight for m in answers):
        problems.skipped["a weight of 0"] += 1
    elif not all(m.content.strip() or m.tool_calls for m in answers):
        problems.skipped["an empty answer"] += 1
    else:
        return Example(where, messages, learn_from, tools=given)
    return None


def _read_conversation(record: Record, problems: Problems, spelling: Spelling) -> Example | None:
    where, data = record
    given = tools(data.get("tools"), where, problems)
    name = next((n for n in LISTS if n in data), LISTS[0])
    messages = turns(data.get(name), name, where, problems, spelling)
    if messages is None or given is None:
        return None
    system = data.get("system")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return _chat(where, messages, problems, 0, given)


def _read_alpaca(record: Record, problems: Problems, spelling: Spelling) -> Example | None:
    where, data = record
    fields: dict[str, str] = {}
    for name in ("instruction", "input", "output", "system"):
        value = data.get(name)
        if value is None and name in ("input", "system"):
            value = ""
        if not isinstance(value, str) or (name == "instruction" and not value.strip()):
            problems.add(where, name, "text", kind_of(value))
            return None
        fields[name] = value
    messages = [Message("system", fields["system"])] if fields["system"].strip() else []
    history = data.get("history") or []
    if not isinstance(history, list) or not all(isinstance(p, list) and [type(t) for t in p] == [str, str] for p in history):
        problems.add(where, "history", "a list of [question, answer]", kind_of(history))
        return None
    for question, answer in history:
        messages += [Message("user", question), Message("assistant", answer)]
    question = fields["instruction"] + (f"\n\n{fields['input']}" if fields["input"].strip() else "")
    return _chat(where, (*messages, Message("user", question), Message("assistant", fields["output"])), problems)


def _read_completion(record: Record, problems: Problems, spelling: Spelling) -> Example | None:
    where, data = record
    prompt, completion = data.get("prompt"), data.get("completion")
    if isinstance(prompt, list):
        before = turns(prompt, "prompt", where, problems, spelling)
        after = turns(completion, "completion", where, problems, spelling)
        given = tools(data.get("tools"), where, problems)
        if before is None or after is None or given is None:
            return None
        return _chat(where, before + after, problems, len(before), given)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        name, value = ("completion", completion) if isinstance(prompt, str) else ("prompt", prompt)
        problems.add(where, name, "text", kind_of(value))
        return None
    if not completion.strip():
        problems.skipped["an empty answer"] += 1
        return None
    return Example(where, prompt=prompt, text=completion)


def _read_text(record: Record, problems: Problems, spelling: Spelling) -> Example | None:
    text = record.data.get("text")
    if not isinstance(text, str):
        problems.add(record.where, "text", "text", kind_of(text))
        return None
    if not text.strip():
        problems.skipped["empty text"] += 1
        return None
    return Example(record.where, text=text)
