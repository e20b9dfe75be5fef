"""Shapes: recognised from columns, turned into messages, and refused with the place where they are not understood."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.data.problems import Problems, Where
from halfbyte.data.shapes import Example, reader
from halfbyte.data.sources import Record
from halfbyte.errors import DataError

HERE = Where("chats.jsonl", 7)


def convert(data: dict[str, Any], shape: str = "auto") -> tuple[str, Example | None, Problems]:
    problems = Problems()
    record = Record(HERE, data)
    found = reader(shape, record)
    return found.shape, found.read(record, problems), problems


def turns(example: Example | None) -> list[tuple[str, str]]:
    assert example is not None
    return [tuple(m) for m in example.messages]


QA = [("user", "One?"), ("assistant", "two")]
GPT = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "two"}]
PARTS = [{"type": "text", "text": "One"}, {"type": "text", "text": "?"}]


@pytest.mark.parametrize(
    ("shape", "data", "wanted"),
    [
        ("messages", {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "two"}]}, QA),
        ("messages", {"conversations": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "two"}]}, QA),
        ("sharegpt", {"conversations": GPT}, QA),
        ("sharegpt", {"system": "S", "conversations": GPT}, [("system", "S"), *QA]),
        ("alpaca", {"instruction": "One?", "input": "", "output": "two"}, QA),
        ("alpaca", {"instruction": "One", "input": "?", "output": "two"}, [("user", "One\n\n?"), QA[1]]),
        (
            "alpaca",
            {"instruction": "One?", "output": "two", "system": "S", "history": [["a", "b"]]},
            [("system", "S"), ("user", "a"), ("assistant", "b"), *QA],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "two"}]},
            QA,
        ),
    ],
)  # fmt: skip
def test_recognised(shape: str, data: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    found, example, problems = convert(data)
    assert found == shape and turns(example) == wanted and problems.total == 0
    assert turns(convert(data, shape)[1]) == wanted


def test_text_and_completion() -> None:
    assert convert({"text": "abc"})[:2] == ("text", Example(HERE, text="abc"))
    assert convert({"prompt": "a", "completion": "b"})[:2] == ("prompt_completion", Example(HERE, prompt="a", text="b"))


def test_placeholders_are_data() -> None:
    _, example, _ = convert({"instruction": "hi {{name}}", "output": "I am {{author}} {% x %}"})
    assert turns(example) == [("user", "hi {{name}}"), ("assistant", "I am {{author}} {% x %}")]


@pytest.mark.parametrize(
    ("data", "code", "word"),
    [
        ({"conversations": [], "chosen": {}, "rejected": {}}, "data.shape", "preference pairs"),
        ({"messages": [{"role": "user", "content": "a"}], "label": True}, "data.shape", "good or bad"),
        ({"images": [], "messages": []}, "data.shape", "images"),
        ({"question": "a", "answer": "b"}, "data.shape", "`answer`, `question`"),
        ({}, "data.shape", "(none)"),
    ],
)
def test_not_built(data: dict[str, Any], code: str, word: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(data)
    assert caught.value.code == code and word in str(caught.value) and "chats.jsonl:7" in str(caught.value) and caught.value.hint


def test_a_named_shape_overrides_the_refusal_and_tells_what_it_ignores() -> None:
    record = Record(HERE, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": False})
    assert reader("messages", record).ignored == ("label",)


A = {"role": "assistant", "content": "two"}
ROLE = "`messages[0].role`: expected system, user or assistant, got "


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"messages": "x"}, "`messages`: expected a list of messages, got the text 'x'"),
        ({"messages": []}, "`messages`: expected a list of messages, got an empty list"),
        ({"messages": [3, A]}, "`messages[0]`: expected an object with `role` and `content` (or `from` and `value`), got a"),
        ({"messages": [{"role": "user", "content": None}, A]}, "`messages[0].content`: expected text, got nothing (null)"),
        ({"messages": [{"role": "robot", "content": "a"}, A]}, ROLE + "the text 'robot'"),
        ({"messages": [{"content": "a"}, A]}, ROLE + "nothing (null)"),
        ({"messages": [A, {"role": "tool", "content": "a"}]}, ROLE.replace("0", "1") + "a tool turn (`tool`)"),
        ({"messages": [{**A, "tool_calls": [1]}]}, "got a tool turn (`assistant`)"),
        ({"messages": [{**A, "weight": 0}]}, "`messages[0].weight`: expected no such key (it is not built yet), got a number"),
        ({"messages": [A], "tools": "[{}]"}, "`tools`: expected no tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, "`messages[0].content`: expected text, got a list"),
        ({"instruction": "", "output": "a"}, "`instruction`: expected text, got an empty string"),
        ({"instruction": "a", "output": 3}, "`output`: expected text, got a number"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "`history`: expected a list of [question, answer], got a list"),
        ({"prompt": "a", "completion": None}, "`completion`: expected text, got nothing (null)"),
        ({"prompt": [A], "completion": "x"}, "`completion`: expected a list of messages, got the text 'x'"),
        ({"text": True}, "`text`: expected text, got true/false"),
    ],
)  # fmt: skip
def test_mistakes_name_the_field(data: dict[str, Any], said: str) -> None:
    shape = "messages" if "messages" in data else "auto"
    _, example, problems = convert(data, shape)
    assert example is None and problems.total == 1
    with pytest.raises(DataError) as caught:
        problems.raise_any()
    assert said in str(caught.value) and "chats.jsonl:7" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer by the assistant"),
        ({"instruction": "a", "output": " "}, "an empty answer"),
        ({"prompt": "a", "completion": ""}, "an empty answer"),
        ({"text": "\n"}, "empty text"),
    ],
)
def test_what_has_nothing_to_learn_is_left_out_and_counted(data: dict[str, Any], why: str) -> None:
    _, example, problems = convert(data)
    assert example is None and problems.total == 0 and problems.skipped == {why: 1}
