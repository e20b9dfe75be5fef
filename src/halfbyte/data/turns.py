"""Turns of a conversation, in every spelling that people use, read into one: `Message`.

    role        role | from | speaker | author | sender        (another: `data.train[].keys`)
    text        content | value | text | message
    thinking    reasoning_content | reasoning | thinking
    tool calls  tool_calls, function_call (OpenAI), or a turn by `function_call` whose text is JSON (ShareGPT)
    loss        weight | loss_weight: a number >= 0; train | training: true or false

Why arguments become objects: chat templates write them with `tojson`, and a string would be quoted twice. Why nulls inside
the arguments of an Arrow or Parquet row go: Arrow gives every row the columns of all rows, and nobody wrote those. Cost:
microseconds a turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from halfbyte.data.problems import Problems, Where, kind_of

Role = Literal["system", "user", "assistant", "tool"]
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLS = frozenset({"function_call", "tool_call"})  # roles whose text is a call
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
TEXT_KEYS = ("content", "value", "text", "message")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "loss_weight")
TRAIN_KEYS = ("train", "training")
OTHERS = frozenset({"tool_calls", "function_call", "tool_call_id", "name"})
KNOWN = frozenset({*ROLE_KEYS, *TEXT_KEYS, *THOUGHT_KEYS, *WEIGHT_KEYS, *TRAIN_KEYS, *OTHERS})
Calls = tuple[Mapping[str, Any], ...]


class Message(NamedTuple):
    """One turn. weight: of its tokens in the loss (0: context only). tool_calls: `{type, id, function: {name, arguments}}`."""

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: Calls = ()
    name: str = ""
    tool_call_id: str = ""
    weight: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """What a chat template is given: `role` and `content`, and of the rest what is there, under transformers' names."""
        rest = {"reasoning_content": self.reasoning, "name": self.name, "tool_call_id": self.tool_call_id}
        chat: dict[str, Any] = {"role": self.role, "content": self.content, **{k: v for k, v in rest.items() if v}}
        return {**chat, "tool_calls": [dict(call) for call in self.tool_calls]} if self.tool_calls else chat


@dataclass(frozen=True, slots=True)
class Example:
    """One example in the common form: `messages`, or `text` after an unlearned `prompt`.

    Answers are learned from the message number `learn_from` on: what comes before is context (a prompt given as messages).
    tools: JSON schemas that the template is given. weight: of all its tokens in the loss. group: what must not be on both sides
    of the split between training and held-out examples ("": its own tokens).
    """

    where: Where
    messages: tuple[Message, ...] = ()
    learn_from: int = 0
    prompt: str = ""
    text: str = ""
    tools: Calls = ()
    weight: float = 1.0
    group: str = ""


class Spelling(NamedTuple):
    """How turns are written where it is not as usual: the keys of role and text, and roles by other names."""

    role: str = ""
    text: str = ""
    roles: tuple[tuple[str, Role], ...] = ()


USUAL = Spelling()


def turns(value: Any, name: str, where: Where, problems: Problems, spelling: Spelling = USUAL) -> tuple[Message, ...] | None:
    """A list of turns, or one alone, in any spelling; None after a mistake was noted."""
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        problems.add(where, name, "a list of messages", "an empty list" if value == [] else kind_of(value))
        return None
    messages: list[Message] = []
    usual = spelling == USUAL
    for number, turn in enumerate(value):
        message = _turn(turn, f"{name}[{number}]", where, problems, spelling, usual)
        if message is None:
            return None
        messages.append(message)
    return tuple(messages)


def _turn(turn: Any, name: str, where: Where, problems: Problems, spelling: Spelling, usual: bool) -> Message | None:
    # Nearly all turns are that plain, and most of the time went here.
    if usual and type(turn) is dict and len(turn) == 2:
        spoken, content = (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
        if type(content) is str and type(spoken) is str and spoken in ROLES and spoken not in CALLS:
            return Message(ROLES[spoken], content)
    if not isinstance(turn, Mapping):
        problems.add(where, name, "an object with `role` and `content` (or `from` and `value`)", kind_of(turn))
        return None
    role_key = spelling.role or next((k for k in ROLE_KEYS if turn.get(k) is not None), ROLE_KEYS[0])
    text_key = spelling.text or _text_key(turn, role_key, name, where, problems)
    if not text_key:
        return None
    spoken = turn.get(role_key)
    role = _role(spoken, spelling)
    if role is None:
        hint = f"say what it is: `data.train: [{{path: ..., roles: {{{spoken}: assistant}}}}]`" if _names_one(spoken) else ""
        expected = "system, user, assistant or tool (others: `roles`)"
        problems.add(where, f"{name}.{role_key}", expected, kind_of(spoken), hint=hint)
        return None
    calls = _calls(turn, name, where, problems)
    weight = _weight(turn, name, where, problems)
    content = _content(turn.get(text_key))
    if content is None and turn.get(text_key) is None and calls:
        content = ""
    if calls is None or weight is None:
        return None
    if content is None:
        problems.add(where, f"{name}.{text_key}", "text", kind_of(turn.get(text_key)))
        return None
    if isinstance(spoken, str) and spoken.lower() in CALLS:
        calls, content = _spoken_calls(content, f"{name}.{text_key}", where, problems), ""
        if calls is None:
            return None
    for key in turn.keys() - KNOWN - {role_key, text_key}:
        if turn[key] is not None:
            problems.noted[f"a turn has the key `{key}`, which is not read"] += 1
    thought = next((turn[k] for k in THOUGHT_KEYS if k != text_key and isinstance(turn.get(k), str)), "")
    named = [v if isinstance(v := turn.get(k), str) and k != role_key else "" for k in ("name", "tool_call_id")]
    return Message(role, content, thought, calls, named[0], named[1], weight)


def _role(spoken: Any, spelling: Spelling) -> Role | None:
    if not isinstance(spoken, str):
        return None
    return dict(spelling.roles).get(spoken) or ROLES.get(spoken.strip().lower())


def _names_one(spoken: Any) -> bool:
    """Whether this is a word that a recipe can say the meaning of."""
    return isinstance(spoken, str) and len(spoken) <= 40 and spoken.replace("-", "_").isidentifier()


def _text_key(turn: Mapping[str, Any], role_key: str, name: str, where: Where, problems: Problems) -> str:
    """The key of the text; empty after a mistake: two texts in one turn are a choice that is not ours."""
    found = [key for key in TEXT_KEYS if key != role_key and turn.get(key) is not None]
    if len(found) > 1 and len({str(turn[key]) for key in found}) > 1:
        problems.add(where, name, "one text (name its key: `keys: {content: ...}`)", " and ".join(f"`{key}`" for key in found))
        return ""
    return found[0] if found else ("value" if role_key == "from" else "content")


def _content(value: Any) -> str | None:
    """Text, or OpenAI's list of parts when all of them are text."""
    if isinstance(value, list) and value:
        parts = [p.get("text") if isinstance(p, Mapping) and p.get("type", "text") == "text" else None for p in value]
        return "".join(cast("list[str]", parts)) if all(isinstance(p, str) for p in parts) else None
    return value if isinstance(value, str) else None


def _weight(turn: Mapping[str, Any], name: str, where: Where, problems: Problems) -> float | None:
    for key in TRAIN_KEYS:
        if isinstance(turn.get(key), bool):
            return float(turn[key])
    for key in (*WEIGHT_KEYS, *TRAIN_KEYS):
        if turn.get(key) is not None:
            return number(turn[key], f"{name}.{key}", where, problems)
    return 1.0


def number(value: Any, name: str, where: Where, problems: Problems) -> float | None:
    """A weight: a finite number that is not negative, or true or false; text of one counts (CSV has nothing else)."""
    try:
        found = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or found < 0:
        problems.add(where, name, "a number >= 0 (the weight in the loss)", kind_of(value))
        return None
    return found


def _calls(turn: Mapping[str, Any], name: str, where: Where, problems: Problems) -> Calls | None:
    found = turn.get("tool_calls") or turn.get("function_call") or []
    key = "tool_calls" if turn.get("tool_calls") else "function_call"
    return _each_call(found, f"{name}.{key}", where, problems)


def _spoken_calls(text: str, name: str, where: Where, problems: Problems) -> Calls | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        problems.add(where, name, "a tool call as JSON (`name`, `arguments`)", kind_of(text), "data.tools")
        return None
    return _each_call(value, name, where, problems)


def _each_call(value: Any, name: str, where: Where, problems: Problems) -> Calls | None:
    calls: list[Mapping[str, Any]] = []
    for item in value if isinstance(value, list) else [value]:
        body = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str) or not body["name"]:
            problems.add(where, name, "tool calls with a `name` and `arguments`", kind_of(body or item), "data.tools")
            return None
        arguments = body.get("arguments", body.get("parameters"))
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
        except (ValueError, RecursionError):
            problems.add(where, f"{name}.arguments", "a JSON object", kind_of(arguments), "data.tools")
            return None
        if not isinstance(arguments, Mapping):
            problems.add(where, f"{name}.arguments", "a JSON object", kind_of(arguments), "data.tools")
            return None
        call = {"type": "function", "function": {"name": body["name"], "arguments": written(arguments, where)}}
        calls.append({**call, "id": item["id"]} if isinstance(item.get("id"), str) else call)
    return tuple(calls)


def tools(value: Any, where: Where, problems: Problems) -> Calls | None:
    """The `tools` column: a list of JSON schemas, or JSON text of one; None after a mistake was noted."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            problems.add(where, "tools", "a list of tool schemas, or JSON text of one", kind_of(value), "data.tools")
            return None
    found: list[Mapping[str, Any]] = []
    for item in value if isinstance(value, list) else [value] if value else []:
        body = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            problems.add(where, "tools", "tool schemas with a `name`", kind_of(item), "data.tools")
            return None
        found.append({"type": "function", "function": written(body, where)})
    return tuple(found)


def written(value: Any, where: Where) -> Any:
    """A nested value without the nulls that Arrow added to it; as it is where the file has lines."""
    if where.unit != "row":
        return dict(value) if isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        return {k: written(v, where) for k, v in value.items() if v is not None}
    return [written(v, where) for v in value] if isinstance(value, list) else value
