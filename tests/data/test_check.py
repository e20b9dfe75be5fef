"""The machinery of the checks: levels and wishes, copies against brute force, memory of earlier looks, repair, wrong lines."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data.check import duplicates, lines, private, repair, run, texts
from halfbyte.data.check.findings import CHECKS, Findings, brief
from halfbyte.data.config import DataConfig, SourceConfig
from halfbyte.data.prepare import prepare
from halfbyte.errors import DataError, RecipeError


def source(examples: list[list[int]]) -> Any:
    """Tokens as far as copies need them."""
    offsets = np.concatenate([[0], np.cumsum([len(e) for e in examples])]).astype(np.int64)
    ids = np.asarray([i for e in examples for i in e], dtype=np.uint32)

    class Source(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.offsets) - 1

    return Source(ids=ids, offsets=offsets)


@pytest.fixture
def varied() -> list[list[int]]:
    """Examples with a common head, exact copies, copies with a few other tokens, empty ones and very short ones."""
    rng = np.random.default_rng(0)
    head = list(range(12))
    examples = [head + rng.integers(100, 5000, rng.integers(30, 120)).tolist() for _ in range(60)]
    examples += [list(examples[i]) for i in (3, 3, 7)]
    for i, changes in ((10, 1), (11, 3), (12, 30)):
        other = list(examples[i])
        for place in rng.integers(12, len(other), changes):
            other[place] = int(rng.integers(100, 5000))
        examples.append(other)
    return [*examples, [1], [], [2, 3], [1]]


def test_copies_are_those_of_brute_force(varied: list[list[int]]) -> None:
    found = duplicates.find([source(varied[:40]), source(varied[40:])], 0.8)
    assert found.exact.tolist() == [next(j for j, other in enumerate(varied) if other == e) for e in varied]
    sets = [{tuple(e[i : i + 3]) for i in range(10, len(e) - 2)} for e in varied]  # the head is everybody's
    pairs = {
        (i, j)
        for i, j in itertools.combinations(range(len(varied)), 2)
        if sets[i] | sets[j] and len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])
    }
    assert {(3, 60), (10, 63), (11, 64)} <= pairs and (12, 65) not in pairs
    near = {(i, j) for g in found.twins() for i, j in itertools.combinations(g.tolist(), 2) if sets[i]}
    assert near == pairs
    assert (duplicates.find([source(varied)], 0).near == found.exact).all()


def test_parts_of_a_large_source_make_no_difference(varied: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = duplicates.find([source(varied)], 0.8)
    monkeypatch.setattr("halfbyte.data.check.hashing.CHUNK", 200)
    parts = duplicates.find([source(varied)], 0.8)
    assert (whole.exact == parts.exact).all() and (whole.near == parts.near).all()


def test_what_the_recipe_wishes() -> None:
    plain, strict, deaf = Findings(), Findings(stop=("data.control",)), Findings(ignore=("data.control",))
    for findings in (plain, strict, deaf):
        findings.add("data.control", "a", 1, 1000, ("a.jsonl:7",))
        findings.add("data.overlap", "a", 5, 100)
    assert (len(plain.errors), len(strict.errors), len(deaf.found)) == (0, 1, 1)
    plain.add("data.overlap", "b", 6, 100)
    with pytest.raises(DataError, match=r"\[data\.overlap\] b: 6 of 100 \(6\.0%\)") as caught:
        plain.raise_errors()
    assert caught.value.code == "data.overlap" and "data.check.ignore: [data.overlap]" in caught.value.hint
    assert "data.control" in deaf.lines()[-2] and "data.control" not in deaf.passed()
    with pytest.raises(RecipeError, match=r"`data\.check\.stop`: no check is called `data\.controll`") as wrong:
        Findings(stop=("data.controll",))
    assert wrong.value.hint == "did you mean `data.control`?"


def test_places_are_short() -> None:
    assert brief(f"{Path.cwd()}/data/x.jsonl:7 = /tmp/far/off.parquet row 3") == "data/x.jsonl:7 = off.parquet row 3"
    assert brief("data/x.jsonl:7: expected a/b, got /x") == "data/x.jsonl:7: expected a/b, got /x"


def test_every_check_has_a_sentence_and_a_fix() -> None:
    assert len(CHECKS) >= 40
    assert all(len(c.sentence) > 10 and len(c.fix) > 10 and (c.stops is None or 0 <= c.stops < 1) for c in CHECKS.values())


@pytest.fixture
def looked(tokenizer: Any, jsonl: Any, tmp_path: Path) -> Callable[..., run.Checked]:
    def look(records: list[Any], name: str = "data.jsonl", **options: Any) -> run.Checked:
        config = DataConfig(**{"train": [str(jsonl(records, name))], "eval": 0, "tokens": 256, **options})
        return run.check(config, tokenizer, 0, tmp_path / "cache")

    return look


def test_a_second_look_is_remembered(looked: Any, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [chat(f"What is {i}?", f"It is {i}\x00, of course." if i == 3 else f"It is the number {i}.") for i in range(30)]
    first = looked(records)
    monkeypatch.setattr(texts.Tests, "__call__", lambda *_: pytest.fail("looked again"))
    monkeypatch.setattr(duplicates, "find", lambda *_: pytest.fail("compared again"))
    assert looked(records).findings.as_dict() == first.findings.as_dict() and first.findings.ids() == {"data.control"}


def test_what_is_said_of_a_whole_source_has_no_count(looked: Any, tmp_path: Path) -> None:
    (line, *_) = looked([], "empty.jsonl").findings.lines()
    assert brief(line) == "error [data.empty] empty: `empty.jsonl` is empty"


def test_an_unknown_role_is_told_with_its_fix(looked: Any, chat: Any) -> None:
    found = looked([chat("a", "b"), {"messages": [{"role": "agent", "content": "x"}]}]).findings.errors
    assert "roles: {agent: assistant}" in found[0].lines()[-1]


def test_mistakes_of_all_sources_are_told_at_once(looked: Any, chat: Any, jsonl: Any, tmp_path: Path, tokenizer: Any) -> None:
    one = jsonl([chat("a", "b"), {"messages": None}, *[{"messages": [{"role": "robot", "content": "x"}]}] * 15], "one.jsonl")
    two = jsonl([{"prompt": "a", "completion": 3}], "two.jsonl")
    config = DataConfig(train=[str(one), str(two)], eval=0)
    found = run.check(config, tokenizer, 0, tmp_path / "cache")
    assert len(found.problems) == 17 and found.prepared is None
    assert {(f.source, f.count) for f in found.findings.errors} == {("one", 16), ("two", 1)}
    assert found.findings.errors[1].lines()[0].startswith("error [data.bad-example] two: 1 of 1 (100.0%): ")
    assert "data.duplicates" in found.findings.not_run and len(found.as_dict()["wrong_lines"]) == 17
    written, missing = lines.write(found.problems, config.train, tmp_path, tmp_path / "bad.jsonl")
    assert (written, missing) == (17, 0)
    bad = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert bad == [*one.read_text().splitlines()[1:], *two.read_text().splitlines()]
    with pytest.raises(DataError, match="exists already"):
        lines.write(found.problems, config.train, tmp_path, tmp_path / "bad.jsonl")


def test_what_the_template_refuses_is_listed(looked: Any, chat: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages if m['content'] != 'bad' %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = looked([chat("bad" if i % 2 else "good", f"so {i}") for i in range(30)], template=str(tmp_path / "t.jinja"))
    assert {f.id for f in found.findings.errors} <= {"data.template", "data.mask"} and len(found.problems) == 15


def test_wrong_elements_of_an_array_are_written_too(looked: Any, chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in [chat("a", "b"), {"messages": 5}, {"messages": []}]) + "\n]")
    config = SourceConfig(path=str(path))
    found = looked([], train=[str(path)])
    assert lines.write(found.problems, [config], tmp_path, tmp_path / "bad.jsonl") == (2, 0)
    assert [json.loads(x) for x in (tmp_path / "bad.jsonl").read_text().splitlines()] == [{"messages": 5}, {"messages": []}]


def test_a_training_stops_or_tells(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(jsonl([chat(f"What is {i}?", f"It is the number {i}.") for i in range(30)] + [chat("Why?", "So\x00.")] * 2))
    for options, stops in (({}, False), ({"check": {"stop": ["data.duplicates"]}}, True)):
        prepared = prepare(DataConfig(train=[path], eval=0, tokens=256, **options), tokenizer, 0, tmp_path / "cache")
        if stops:
            with pytest.raises(DataError, match=r"data\.duplicates"):
                run.before_training(prepared, tokenizer, tmp_path / "cache")
        else:
            found = run.before_training(prepared, tokenizer, tmp_path / "cache")
            assert found.ids() == {"data.control", "data.duplicates"} and found.summary().endswith("2 warnings")
            with monkeypatch.context() as patch:
                patch.setattr(run, "_look", lambda *_: pytest.fail("looked again"))
                again = run.before_training(prepared, tokenizer, tmp_path / "cache")
            assert again.lines() == found.lines() and again.passed() == found.passed()


def test_what_stops_for_good_is_not_ignored(looked: Any, chat: Any) -> None:
    long = [chat(f"What is {i}?", "more and more " * 60) for i in range(10)]
    found = looked([*long, *([chat("a", "b")] * 9)], check={"ignore": ["data.too-long", "data.duplicates"]}, tokens=64)
    assert found.prepared is None and [f.id for f in found.findings.errors] == ["data.too-long"]
    twice = looked([*long, *([chat("a", "b")] * 9)], tokens=64, eval=0)
    told = {f.id: f for f in twice.findings.found}
    assert twice.prepared is None and told["data.too-long"].error and len(told["data.too-long"].where) == len(long)
    assert told["data.duplicates"].count == 8 and "set `data.tokens: " in told["data.too-long"].fix, "all else is looked at too"
    found = looked(long, too_long="split", tokens=64)
    assert found.prepared is not None and not found.findings.errors and "data.too-long" in found.findings.ids()


def test_a_large_set_is_looked_at_in_part(
    tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(jsonl([chat(f"What is {i}?", f"It is the number {i}\x07.") for i in range(64)]))
    monkeypatch.setattr(run, "AT_START", 8)
    monkeypatch.setattr(run, "NEAR_AT_START", 8)
    prepared = prepare(DataConfig(train=[path], eval=0, tokens=256), tokenizer, 0, tmp_path / "cache")
    found = run.before_training(prepared, tokenizer, tmp_path / "cache")
    assert 8 < found.found[0].total < 40 and len(found.notes) == 2 and "of 64 examples" in found.notes[0]


BROKEN: list[tuple[str, str]] = [
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},', "a comma or bracket"),
    ("{'messages': [{'role': 'user', 'content': 'c'}, {'role': 'assistant', 'content': 'd'}]}", "a Python dict"),
    ("[", "a bracket around the lines"),
    ('{"instruction": "x", "output": "y"}{"instruction": "z", "output": "w"}', "a comma or bracket"),
    (json.dumps({"messages": '[{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]'}), "JSON text"),
    ('{"messages": [{"role": "Person:", "content": "g"}, {"role": " AI ", "content": "h"}]}', "the role"),
    ('{"messages": [{"role": "user", "content": "i"}, {"role": "assistant", "content": 42}]}', "a number written as text"),
    ('{"messages": [{"role": "user", "content": "j"}, {"role": "assistant", "content": "k\\u0000</s>"}]}', "special tokens"),
    ('{"messages": [{"role": "user", "content": "l"}, {"role": "assistant", "content": "Itâ€™s a cafÃ©"}]}', "mojibake undone"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "kind"), BROKEN, ids=[kind for _, kind in BROKEN])
def test_repair(line: str, kind: str, tokenizer: Any, tmp_path: Path) -> None:
    good = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}'
    if "instruction" in line:
        good = '{"instruction": "q", "output": "r"}'
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([good, line, good]) + "\n", encoding="utf-8")
    done = repair.repair(SourceConfig(path=str(path)), tmp_path, texts.special_tokens(tokenizer), tmp_path / "fixed.jsonl")
    assert any(kind in change for change in done.changes) and f"{path}:2" in str(done.changes) and not done.left_out
    assert done.changes["an exact copy left out"] == [f"{path}:3 = {path}:1"]
    again = run.check(DataConfig(train=[done.file], eval=0, tokens=64), tokenizer, 0, tmp_path / "cache")
    assert again.findings.found == [] and again.prepared is not None and len(again.prepared.train) == done.written
    assert done.written == len(Path(done.file).read_text().splitlines()) == 1 + (line != "[") + line.count("}{")


def test_repair_guesses_nothing(chat: Any, tmp_path: Path) -> None:
    sound = [
        chat("Où ?", "À la gare, “là-bas”."),
        chat("<s>?", "The tag <s> in a text"),
        {**chat("One", "two"), "extra": [1, None]},
    ]
    wrong = ['{"messages": [{"role": "user", "content": "a"}', '{"messages": [{"role": "robot", "content": "a"}]}', "hello"]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*map(json.dumps, sound), *wrong]) + "\n", encoding="utf-8")
    done = repair.repair(SourceConfig(path=str(path)), tmp_path, ["<s>", "</s>"], tmp_path / "fixed.jsonl")
    assert not [k for k in done.changes if "special" not in k] and len(done.left_out) == 3
    written = [json.loads(line) for line in (tmp_path / "fixed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written[0] == sound[0] and written[2] == sound[2] and written[1]["messages"][1] == sound[1]["messages"][1]


def test_checksums() -> None:
    assert private.luhn("4111111111111111") and not private.luhn("4111111111111112")
    assert private.iban("DE89370400440532013000") and not private.iban("DE89370400440532013001")
    assert set(private.found("mail a.b@c.org, key ghp_" + "a" * 36)) == {"data.private", "data.secret"}
    assert not list(private.found("In 2024-05-06 at 10.0.0.1 we sold 1234567890123 pieces for 12,345.67 to me@example.com"))


LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
NAMES = ["messages", "conversations", "role", "content", "from", "value", "prompt", "completion", "text", "instruction", "output"]
KEYS = st.sampled_from([*NAMES, "chosen", "rejected", "label", "tools", "system"]) | st.text(max_size=3)
VALUES = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)
LINES = st.one_of(st.binary(max_size=40), st.dictionaries(KEYS, VALUES, max_size=4).map(lambda d: json.dumps(d).encode()))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(LINES, max_size=4))
def test_whatever_stands_in_a_file(content: list[bytes], tokenizer: Any, tmp_path: Path) -> None:
    """Everything ends in findings; repairing ends in a file, or in an error of ours."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(content))
    found = run.check(DataConfig(train=[str(path)], eval=0), tokenizer, 0, tmp_path / "cache", private=True)
    assert found.findings.errors or found.prepared is not None
    json.dumps(found.as_dict())
    for out in (tmp_path / "bad.jsonl", tmp_path / "fixed.jsonl"):
        out.unlink(missing_ok=True)
    lines.write(found.problems, [SourceConfig(path=str(path))], tmp_path, tmp_path / "bad.jsonl")
    with contextlib.suppress(DataError):
        repair.repair(SourceConfig(path=str(path)), tmp_path, ["</s>"], tmp_path / "fixed.jsonl")
