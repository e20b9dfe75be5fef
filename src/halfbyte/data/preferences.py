"""Preference data: pairs of answers (DPO, ORPO, SimPO) and single answers marked good or bad (KTO).

    pairs      prompt + chosen + rejected: text, lists of messages, or one message each                      (explicit prompt)
               chosen + rejected as whole conversations or texts: what they share at the start is the prompt (implicit)
               conversations | messages | instruction [, input] + chosen + rejected                          (LLaMA-Factory)
    labels     prompt + completion + label, or messages | conversations + label: true, false, 1, 0

Why read although no objective learns from them yet: `learn: chosen` learns the preferred answers, and a pair that is broken is
named by its line either way. Cost: microseconds a record.
"""

from __future__ import annotations

from typing import Any

from halfbyte.data.problems import Problems, Where, kind_of
from halfbyte.data.sources import Record
from halfbyte.data.turns import Example, Message, Spelling, tools, turns

LISTS = ("messages", "conversations", "conversation")
LABELS = {"true": True, "false": False, "1": True, "0": False}
Turns = tuple[Message, ...]


def is_label(value: Any) -> bool:
    """Whether a value marks an answer as good or bad."""
    return str(value).strip().lower() in LABELS if isinstance(value, bool | int | str) else False


def read_pair(record: Record, problems: Problems, spelling: Spelling) -> Example | None:
    """The preferred conversation of a pair, once both were read."""
    where, data = record
    given = tools(data.get("tools"), where, problems)
    answers = {name: _side(data.get(name), name, where, problems, spelling) for name in ("chosen", "rejected")}
    chosen, rejected = answers["chosen"], answers["rejected"]
    if chosen is None or rejected is None or given is None:
        return None
    prompt = _prompt(data, where, problems, spelling)
    if prompt is None:
        return None
    if isinstance(chosen, str) != isinstance(rejected, str):
        problems.add(where, "rejected", "the same kind as `chosen`: both text, or both messages", kind_of(data.get("rejected")))
        return None
    if chosen == rejected:
        problems.skipped["chosen and rejected are the same"] += 1
        return None
    if isinstance(chosen, str):
        return _texts(where, prompt, chosen, str(rejected), problems)
    before = (Message("user", prompt),) if isinstance(prompt, str) and prompt else () if isinstance(prompt, str) else prompt
    if before and chosen[: len(before)] == before:
        before = ()  # whole conversations beside their prompt
    assert not isinstance(rejected, str)
    learn_from = len(before) if before else _shared(chosen, rejected)
    return _answered(where, (*before, *chosen), learn_from, given, problems)


def _texts(where: Where, prompt: str | Turns, chosen: str, rejected: str, problems: Problems) -> Example | None:
    if not chosen.strip():
        problems.skipped["an empty answer"] += 1
        return None
    if not isinstance(prompt, str):
        return _answered(where, (*prompt, Message("assistant", chosen)), len(prompt), (), problems)
    if prompt:
        return Example(where, (Message("user", prompt), Message("assistant", chosen)), 1)
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    same = max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same)) + 1  # a word is not cut
    return Example(where, prompt=chosen[:same], text=chosen[same:])


def _answered(where: Where, messages: Turns, learn_from: int, given: tuple[Any, ...], problems: Problems) -> Example | None:
    answers = [m for m in messages[learn_from:] if m.role == "assistant"]
    if not answers:
        problems.add(where, "chosen", "an answer by the assistant", "none after the prompt")
        return None
    if not all(m.content.strip() or m.tool_calls for m in answers):
        problems.skipped["an empty answer"] += 1
        return None
    return Example(where, messages, learn_from, tools=given)


def _shared(chosen: Turns, rejected: Turns) -> int:
    """How many turns two conversations begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))


def _side(value: Any, name: str, where: Where, problems: Problems, spelling: Spelling) -> str | Turns | None:
    return value if isinstance(value, str) else turns(value, name, where, problems, spelling)


def _prompt(data: dict[str, Any], where: Where, problems: Problems, spelling: Spelling) -> str | Turns | None:
    """What comes before the answers; an empty text where nothing is given. A system message goes in front."""
    name = next((n for n in ("prompt", "question", "instruction", *LISTS) if data.get(n) is not None), None)
    if name is None:
        return ""
    value = data[name]
    if isinstance(value, str) and name == "instruction" and isinstance(data.get("input"), str) and data["input"].strip():
        value = f"{value}\n\n{data['input']}"
    found = _side(value, name, where, problems, spelling)
    system = data.get("system")
    if found is None or not isinstance(system, str) or not system.strip():
        return found
    asked = (Message("user", found),) if isinstance(found, str) else found
    return asked if asked[0].role == "system" else (Message("system", system), *asked)


def read_label(record: Record, problems: Problems, spelling: Spelling) -> Example | None:
    """An answer marked good; one marked bad is left out and counted."""
    where, data = record
    if not is_label(data.get("label")):
        problems.add(where, "label", "true or false", kind_of(data.get("label")))
        return None
    name = next((n for n in LISTS if n in data), "prompt")
    before = _side(data.get(name), name, where, problems, spelling)
    after = _side(data.get("completion"), "completion", where, problems, spelling) if name == "prompt" else ()
    given = tools(data.get("tools"), where, problems)
    if before is None or after is None or given is None:
        return None
    if not LABELS[str(data["label"]).strip().lower()]:
        problems.skipped["marked as bad (`label: false`)"] += 1
        return None
    asked = (Message("user", before),) if isinstance(before, str) else before
    answer = (Message("assistant", after),) if isinstance(after, str) else after
    return _answered(where, (*asked, *answer), len(asked) if name == "prompt" else max(0, len(asked) - 1), given, problems)
