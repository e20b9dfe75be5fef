"""Shapes: recognised from columns, turned into messages, and refused with the place where they are not understood."""

from __future__ import annotations

import json
from typing import Any

import pytest

from halfbyte.data.config import SourceConfig
from halfbyte.data.problems import Problems, Where
from halfbyte.data.shapes import Example, layout, reader
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
    return [tuple(m)[:2] for m in example.messages]


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
        ({"prompt": "a", "completion": "b", "label": 0}, "data.shape", "good or bad"),
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
ROLE = "`messages[0].role`: expected system, user, assistant or tool (others: `roles`), got "
CALL = "expected tool calls with a `name` and `arguments`"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"messages": "x"}, "`messages`: expected a list of messages, got the text 'x'"),
        ({"messages": []}, "`messages`: expected a list of messages, got an empty list"),
        ({"messages": [3, A]}, "`messages[0]`: expected an object with `role` and `content` (or `from` and `value`), got a"),
        ({"messages": [{"role": "user", "content": None}, A]}, "`messages[0].content`: expected text, got nothing (null)"),
        ({"messages": [{"role": "robot", "content": "a"}, A]}, ROLE + "the text 'robot'"),
        ({"messages": [{"content": "a"}, A]}, ROLE + "nothing (null)"),
        ({"messages": [{**A, "tool_calls": [1]}]}, f"`messages[0].tool_calls`: {CALL}, got a number"),
        ({"messages": [{"role": "function_call", "content": "call"}]}, "expected a tool call as JSON (`name`, `arguments`)"),
        ({"messages": [{**A, "weight": -1}]}, "`messages[0].weight`: expected a number >= 0 (the weight in the loss)"),
        ({"messages": [{**A, "train": "yes"}]}, "`messages[0].train`: expected a number >= 0"),
        ({"messages": [{**A, "text": "three"}]}, "`messages[0]`: expected one text (name its key"),
        ({"messages": [A], "tools": "[{}]"}, "`tools`: expected tool schemas with a `name`"),
        ({"messages": [A], "tools": "[{"}, "`tools`: expected a list of tool schemas, or JSON text of one"),
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
    ("role", "hint"),
    [
        ("agent", "say what it is: `data.train: [{path: ..., roles: {agent: assistant}}]`"),
        ("a: b", "mend these lines"),
        (None, "mend"),
    ],
)
def test_an_unknown_role_is_mended_by_saying_what_it_is(role: Any, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        convert({"messages": [{"role": role, "content": "a"}, A]}, "messages")[2].raise_any()
    assert caught.value.hint.startswith(hint)


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


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ({"conversations": [{"speaker": "human", "text": "One?"}, {"speaker": "bot", "text": "two"}]}, {}),
        ({"turns": [{"who": "customer", "said": "One?"}, {"who": "agent", "said": "two"}]},
         {"columns": {"messages": "turns"}, "keys": {"role": "who", "content": "said"},
          "roles": {"customer": "user", "agent": "assistant"}}),
        ({"question": "One?", "answer": "two"}, {"columns": {"instruction": "question", "output": "answer"}}),
        ({"row": {"q": "One?", "a": "two"}}, {"columns": {"instruction": "row.q", "output": "row.a"}}),
    ],
)  # fmt: skip
def test_other_names(data: dict[str, Any], options: dict[str, Any]) -> None:
    found = reader("auto", Record(HERE, data), layout(SourceConfig(path="a", **options)))
    assert turns(found.read(Record(HERE, data), Problems())) == QA and found.ignored == ()


def test_a_column_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DataError, match=r"`columns` names `answr`, which the first example lacks") as caught:
        reader("auto", Record(HERE, {"q": "a", "answer": "b"}), layout(SourceConfig(path="a", columns={"output": "answr"})))
    assert "q, answer" in caught.value.hint


SCHEMA = {"name": "add", "parameters": {"type": "object"}}
ASKED = {"name": "add", "arguments": {"a": 1, "b": None}}
CALLED = {"type": "function", "function": ASKED}


@pytest.mark.parametrize("tools", [[SCHEMA], [{"type": "function", "function": SCHEMA}], json.dumps([SCHEMA])])
@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function", "function": ASKED}]},
        {"role": "assistant", "tool_calls": [{"id": "x", "function": {**ASKED, "arguments": json.dumps(ASKED["arguments"])}}]},
        {"role": "assistant", "content": "", "function_call": {**ASKED, "id": "x"}},
        {"from": "function_call", "value": json.dumps({**ASKED, "id": "x"})},
    ],
)
def test_tool_calls(turn: dict[str, Any], tools: Any) -> None:
    reply = {"from": "observation", "value": "3"} if "from" in turn else {"role": "tool", "content": "3", "tool_call_id": "x"}
    data = {"messages": [{"role": "user", "content": "1 + 2?"}, turn, reply, A], "tools": tools}
    _, example, problems = convert(data, "messages")
    assert example is not None and problems.total == 0
    assert example.tools == ({"type": "function", "function": SCHEMA},)
    assert [m.role for m in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1].as_dict() == {"role": "assistant", "content": "", "tool_calls": [{**CALLED, "id": "x"}]}
    assert example.messages[2].tool_call_id == ("" if "from" in turn else "x")


def test_nulls_that_arrow_added_are_not_arguments() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": ASKED}]}
    found = reader("messages", Record(Where("a.parquet", 1, "row"), {"messages": [turn]}))
    example = found.read(Record(Where("a.parquet", 1, "row"), {"messages": [turn]}), Problems())
    assert example is not None and example.messages[0].tool_calls[0]["function"]["arguments"] == {"a": 1}


def test_thoughts_and_weights() -> None:
    turn = {"role": "assistant", "content": "two", "reasoning_content": "Hm.", "weight": 0.5}
    data = {"messages": [{"role": "user", "content": "One?"}, {**A, "train": False}, turn], "w": "2", "id": 7}
    record = Record(HERE, data)
    problems = Problems()
    found = reader("auto", record, layout(SourceConfig(path="a", columns={"weight": "w"}, group="id")))
    example = found.read(record, problems)
    assert example is not None and example.weight == 2 and example.group == "7" and found.ignored == ()
    assert [m.weight for m in example.messages] == [1, 0, 0.5] and example.messages[2].reasoning == "Hm."
    assert example.messages[2].as_dict() == {"role": "assistant", "content": "two", "reasoning_content": "Hm."}
    for weight, seen in (("nan", 1), (-1, 1), (True, 0), (0, 0)):
        problems = Problems()
        assert (found.read(Record(HERE, {**data, "w": weight}), problems) is None) == (weight is not True)
        assert problems.total == seen
    silent = {"messages": [{"role": "user", "content": "One?"}, {**A, "weight": 0}]}
    assert convert(silent)[2].skipped == {"a weight of 0": 1}


BETTER, WORSE = {"role": "assistant", "content": "two"}, {"role": "assistant", "content": "no"}
ONE = {"role": "user", "content": "One?"}


@pytest.mark.parametrize(
    ("data", "learn_from"),
    [
        ({"prompt": "One?", "chosen": "two", "rejected": "no"}, 1),
        ({"prompt": [ONE], "chosen": [BETTER], "rejected": [WORSE]}, 1),
        ({"prompt": [ONE], "chosen": [ONE, BETTER], "rejected": [ONE, WORSE]}, 1),
        ({"chosen": [ONE, BETTER], "rejected": [ONE, WORSE]}, 1),
        ({"conversations": [{"from": "human", "value": "One?"}], "chosen": {"from": "gpt", "value": "two"},
          "rejected": {"from": "gpt", "value": "no"}}, 1),
        ({"instruction": "One?", "input": "", "chosen": "two", "rejected": "no"}, 1),
        ({"prompt": "One?", "completion": "two", "label": True}, 1),
        ({"prompt": [ONE], "completion": [BETTER], "label": 1}, 1),
        ({"messages": [ONE, BETTER], "label": "true"}, 1),
    ],
)  # fmt: skip
def test_the_preferred_answer(data: dict[str, Any], learn_from: int) -> None:
    problems = Problems()
    found = reader("auto", Record(HERE, data), layout(SourceConfig(path="a", learn="chosen")))
    example = found.read(Record(HERE, data), problems)
    assert turns(example) == QA and example is not None and example.learn_from == learn_from and problems.total == 0
    bad = {**data, "label": False} if "label" in data else {**data, "rejected": data["chosen"]}
    assert found.read(Record(HERE, bad), problems) is None and sum(problems.skipped.values()) == 1
    broken = {**data, "label": "maybe"} if "label" in data else {**data, "rejected": None}
    assert found.read(Record(HERE, broken), problems) is None and problems.total == 1


def test_pairs_of_texts_share_their_prompt() -> None:
    data = {"chosen": "Q: one? A: it is two", "rejected": "Q: one? A: it isn't"}
    found = reader("auto", Record(HERE, data), layout(SourceConfig(path="a", learn="chosen")))
    # `is` and `isn't` begin alike; the prompt ends between words.
    assert found.read(Record(HERE, data), Problems()) == Example(HERE, prompt="Q: one? A: it ", text="is two")


@pytest.mark.parametrize(("key", "value"), [("columns", {"instruction": "question"}), ("group", "customer"), ("group", "a.b")])
def test_a_column_that_is_not_there_is_told_once(key: str, value: Any) -> None:
    record = Record(Where("a.jsonl", 1), {"instruction": "One?", "output": "two"})
    with pytest.raises(DataError, match=rf"a.jsonl:1: `{key}` names `.*`, which the first example lacks") as caught:
        reader("auto", record, layout(SourceConfig(path="a", **{key: value})))
    assert caught.value.hint == "its columns: instruction, output"
