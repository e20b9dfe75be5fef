"""Shapes: the few ways in which people write examples down, turned into one: messages, or plain text.

    messages            messages: [{role, content}, ...]                          (OpenAI)
    sharegpt            conversations: [{from, value}, ...]                       (ShareGPT, axolotl)
    alpaca              instruction, input, output [, history, system]            (Stanford Alpaca)
    prompt_completion   prompt, completion: both text, or both lists of messages
    text                text

Why recognised from the columns: nobody should register a file to learn from it; the choice is reported. What looks like
something that is not built (preference pairs, tool calls, images) is an error, never half read. Text such as `{{name}}` is
data: nothing is filled in. Cost: microseconds a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from halfbyte.data.problems import Problems, Where, kind_of
from halfbyte.data.sources import Record
from halfbyte.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip
TOOL_ROLES = frozenset(
    {"tool", "function", "ipython", "function_call", "function_response", "observation", "tool_call", "tool_response"}
)
LISTS = ("messages", "conversations", "conversation")
COLUMNS: dict[str, set[str]] = {
    "messages": {*LISTS, "system"},
    "sharegpt": {*LISTS, "system"},
    "alpaca": {"instruction", "input", "output", "history", "system"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
}  # shape -> columns that are read


class Message(NamedTuple):
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One example in the common form: `messages`, or `text` after an unlearned `prompt`.

    Answers are learned from the message number `learn_from` on: what comes before is context (a prompt given as messages).
    """

    where: Where
    messages: tuple[Message, ...] = ()
    learn_from: int = 0
    prompt: str = ""
    text: str = ""


class Reader(NamedTuple):
    """How one source is read: its shape, the columns that are not read, and the function from a record to an example."""

    shape: str
    ignored: tuple[str, ...]
    read: Callable[[Record, Problems], Example | None]


def reader(shape: str, first: Record) -> Reader:
    """The reader for a named shape, or for the one that the first record's columns show (`auto`).

    Raises `DataError` (`data.shape`) when the columns fit no shape, or fit one that is not built.
    """
    columns = set(first.data)
    if shape == "auto":
        shape = _recognise(first, columns)
    read = COLUMNS[shape]
    ignored = tuple(sorted(columns - read - {"tools"}))
    readers: dict[str, Callable[[Record, Problems], Example | None]] = {
        "messages": _read_conversation, "sharegpt": _read_conversation, "alpaca": _read_alpaca,
        "prompt_completion": _read_completion, "text": _read_text,
    }  # fmt: skip
    return Reader(shape, ignored, readers[shape])


def _recognise(first: Record, columns: set[str]) -> str:
    where, data = first
    if columns & {"chosen", "rejected"}:
        what = "preference pairs (`chosen`, `rejected`)"
        raise DataError(f"{where}: these are {what}, which are not built yet", hint=_force("messages"), code="data.shape")
    if {"images", "image", "videos", "audios", "audio"} & columns:
        raise DataError(f"{where}: images, video and sound are not built", hint="halfbyte learns from text", code="data.shape")
    lists = [name for name in LISTS if isinstance(data.get(name), list)]
    if lists:
        if isinstance(data.get("label"), bool):
            what = "answers marked good or bad (`label`, for KTO)"
            raise DataError(f"{where}: these are {what}, which are not built yet", hint=_force("messages"), code="data.shape")
        turns = data[lists[0]]
        return "sharegpt" if turns and isinstance(turns[0], Mapping) and "from" in turns[0] else "messages"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if "text" in columns:
        return "text"
    known = "messages | conversations | instruction + output | prompt + completion | text"
    message = f"{where}: no shape has the columns {', '.join(f'`{c}`' for c in sorted(columns)) or '(none)'}"
    raise DataError(message, hint=f"rename them to one of: {known}", code="data.shape")


def _force(shape: str) -> str:
    return f"to learn every answer as it stands all the same, name the shape: `{{path: ..., shape: {shape}}}`"


def _turns(value: Any, name: str, where: Where, problems: Problems) -> tuple[Message, ...] | None:
    """A list of turns, in either spelling; None after a mistake was noted."""
    if not isinstance(value, list) or not value:
        problems.add(where, name, "a list of messages", "an empty list" if value == [] else kind_of(value))
        return None
    messages: list[Message] = []
    for number, turn in enumerate(value):
        message = _turn(turn, f"{name}[{number}]", where, problems)
        if message is None:
            return None
        messages.append(message)
    return tuple(messages)


def _turn(turn: Any, name: str, where: Where, problems: Problems) -> Message | None:
    if not isinstance(turn, Mapping):
        problems.add(where, name, "an object with `role` and `content` (or `from` and `value`)", kind_of(turn))
        return None
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    role, content = turn.get(role_key), turn.get(text_key)
    if role in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        problems.add(where, f"{name}.{role_key}", "system, user or assistant", f"a tool turn (`{role}`)", "data.tools")
        return None
    if not isinstance(role, str) or role.lower() not in ROLES:
        problems.add(where, f"{name}.{role_key}", "system, user or assistant", kind_of(role))
        return None
    for key in ("weight", "train", "reasoning_content"):
        if turn.get(key) is not None:
            problems.add(where, f"{name}.{key}", "no such key (it is not built yet)", kind_of(turn[key]))
            return None
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, Mapping) and p.get("type", "text") == "text" else None for p in content]
        content = "".join(cast("list[str]", parts)) if all(isinstance(p, str) for p in parts) else content
    if not isinstance(content, str):
        problems.add(where, f"{name}.{text_key}", "text", kind_of(content))
        return None
    return Message(ROLES[role.lower()], content)


def _chat(where: Where, messages: tuple[Message, ...], problems: Problems, learn_from: int = 0) -> Example | None:
    """Leaves out, counted, what has nothing to learn: no answer at all, or an empty one."""
    answers = [m.content for m in messages[learn_from:] if m.role == "assistant"]
    if not answers:
        problems.skipped["no answer by the assistant"] += 1
    elif not all(text.strip() for text in answers):
        problems.skipped["an empty answer"] += 1
    else:
        return Example(where, messages, learn_from)
    return None


def _read_conversation(record: Record, problems: Problems) -> Example | None:
    where, data = record
    tools = data.get("tools")
    if tools and tools not in ("[]", "{}"):
        problems.add(where, "tools", "no tools (they are not built yet)", kind_of(tools), "data.tools")
        return None
    name = next((n for n in LISTS if n in data), LISTS[0])
    messages = _turns(data.get(name), name, where, problems)
    if messages is None:
        return None
    system = data.get("system")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return _chat(where, messages, problems)


def _read_alpaca(record: Record, problems: Problems) -> Example | None:
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


def _read_completion(record: Record, problems: Problems) -> Example | None:
    where, data = record
    prompt, completion = data.get("prompt"), data.get("completion")
    if isinstance(prompt, list):
        before = _turns(prompt, "prompt", where, problems)
        after = _turns(completion, "completion", where, problems)
        return None if before is None or after is None else _chat(where, before + after, problems, learn_from=len(before))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        name, value = ("completion", completion) if isinstance(prompt, str) else ("prompt", prompt)
        problems.add(where, name, "text", kind_of(value))
        return None
    if not completion.strip():
        problems.skipped["an empty answer"] += 1
        return None
    return Example(where, prompt=prompt, text=completion)


def _read_text(record: Record, problems: Problems) -> Example | None:
    text = record.data.get("text")
    if not isinstance(text, str):
        problems.add(record.where, "text", "text", kind_of(text))
        return None
    if not text.strip():
        problems.skipped["empty text"] += 1
        return None
    return Example(record.where, text=text)
