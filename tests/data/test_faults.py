"""The table of faults: mistakes planted one at a time in real data, and the id under which each is told.

The base is 40 dialogues of a public set in which nothing is found; every fault changes a few of them, the file, the template or
the mask, and leaves the rest as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from halfbyte.data.check import learned
from halfbyte.data.check.findings import CHECKS, Findings
from halfbyte.data.check.run import Checked, check
from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import prepare
from halfbyte.errors import DataError

Records = list[dict[str, Any]]
BASE = 40
BOS_TWICE = "<s><s>{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + NO_SYSTEM
UPPER = NO_SYSTEM.replace("m['content']", "m['content'].upper()")


def say(record: dict[str, Any], text: str, turn: int = 1) -> None:
    """Puts a text in place of a turn: 0 asks, 1 answers."""
    record["messages"][turn]["content"] = text


def reply(record: dict[str, Any]) -> str:
    return str(record["messages"][1]["content"])


def answer(change: Callable[[str], str], turn: int = 1) -> Callable[[Records], None]:
    """A fault in three answers."""

    def plant(records: Records) -> None:
        for record in records[5:8]:
            say(record, change(record["messages"][turn]["content"]), turn)

    return plant


def turns(change: Callable[[list[Any]], list[Any]]) -> Callable[[Records], None]:
    """A fault in the turns of two examples."""

    def plant(records: Records) -> None:
        for record in records[5:7]:
            record["messages"] = change(record["messages"])

    return plant


def line(change: Callable[[str], str | bytes]) -> Callable[[Records], list[bytes]]:
    """A fault in one line of the file, as bytes."""

    def plant(records: Records) -> list[bytes]:
        lines: list[str | bytes] = [json.dumps(r) for r in records]
        lines[11] = change(str(lines[11]))
        return [entry if isinstance(entry, bytes) else entry.encode() for entry in lines]

    return plant


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Records], None]:
    """A fault in the twelfth record."""

    def plant(records: Records) -> None:
        records[11] = change(records[11])

    return plant


def everywhere(change: Callable[[dict[str, Any]], Any]) -> Callable[[Records], None]:
    """A fault in all records."""

    def plant(records: Records) -> None:
        records[:] = [change(record) for record in records]

    return plant


def near(record: dict[str, Any]) -> dict[str, Any]:
    """The same dialogue with a word more."""
    copy = json.loads(json.dumps(record))
    say(copy, reply(copy) + " Indeed.")
    return dict(copy)


def longest(records: Records) -> list[dict[str, Any]]:
    """The five dialogues with the longest answers."""
    return sorted(records, key=lambda r: len(reply(r)))[-5:]


def mojibake(text: str) -> str:
    """UTF-8 read as Windows-1252."""
    return (
        f"It\u2019s a \u201ccaf\u00e9\u201d \u2013 na\u00efve. {text}".encode()
        .decode("cp1252", errors="replace")
        .replace("\ufffd", "\x9d")
    )


def system(record: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "Answer in rhyme."}, *record["messages"]]}


def pair(record: dict[str, Any], chosen: str = " Certainly, and here is more of it.", rejected: str = "") -> dict[str, Any]:
    text = reply(record)
    return {"prompt": record["messages"][0]["content"], "chosen": text + chosen, "rejected": text + rejected}


BESIDE = {"data.no-answer", "data.control", "data.shape"}  # an answerless set is empty too, wrongly decoded bytes are controls
U, A = {"role": "user", "content": "And why is that so?"}, {"role": "assistant", "content": "Because it was always so."}
FOREIGN = ("[INST] {} [/INST]", "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>", "<start_of_turn>model\n{}<end_of_turn>")
BLOB = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk" * 8


class Fault(NamedTuple):
    """What is done to the records, and the id that must be told; `error`: it must stop a training."""

    name: str
    id: str
    plant: Callable[[Records], Any]
    error: bool = True
    options: Mapping[str, Any] = MappingProxyType({})
    file: str = "data.jsonl"


def _w(name: str, id: str, plant: Callable[[Records], Any], **options: Any) -> Fault:
    return Fault(name, id, plant, False, options)


FAULTS = [
    Fault("a line cut off", "data.bad-file", line(lambda s: s[: len(s) // 2])),
    Fault("a comma after an object", "data.bad-file", line(lambda s: s + ",")),
    Fault("a Python dict", "data.bad-file", line(lambda s: repr(json.loads(s)))),
    Fault("two objects on a line", "data.bad-file", line(lambda s: s + s)),
    Fault("a line in Latin-1", "data.bad-file", line(lambda s: s.replace("e", "\u00e9").encode("latin-1"))),
    Fault("a line break inside a string", "data.bad-file", line(lambda s: s.replace(" ", "\n", 1))),
    Fault("a number in place of an object", "data.bad-file", line(lambda s: "42")),
    Fault("an array file cut off", "data.bad-file", lambda rs: [json.dumps(rs, indent=1)[:-2000].encode()], file="data.json"),
    Fault("a CSV record with a column less", "data.bad-file",
          lambda rs: [b"prompt,completion", *(b'"question %d?","answer"' % i for i in range(30)), b"alone"], file="data.csv"),
    Fault("no messages", "data.bad-example", rewrite(lambda r: {"messages": None})),
    Fault("an empty list of messages", "data.bad-example", rewrite(lambda r: {"messages": []})),
    Fault("content is null", "data.bad-example", turns(lambda t: [t[0], {**t[1], "content": None}])),
    Fault("content is a number", "data.bad-example", turns(lambda t: [t[0], {**t[1], "content": 42}])),
    Fault("an unknown role", "data.bad-example", turns(lambda t: [t[0], {**t[1], "role": "robot"}])),
    Fault("a turn without a role", "data.bad-example", turns(lambda t: [t[0], {"content": "yes"}])),
    Fault("messages as JSON text", "data.bad-example", rewrite(lambda r: {"messages": json.dumps(r["messages"])})),
    Fault("a message that is a string", "data.bad-example", turns(lambda t: ["hello", t[1]])),
    Fault("Alpaca without output", "data.bad-example", lambda rs: rs.__setitem__(
        slice(None), [{"instruction": r["messages"][0]["content"], "output": None if i == 9 else "so"} for i, r in enumerate(rs)])),
    Fault("unknown columns", "data.shape", everywhere(lambda r: {"frage": "a", "antwort": "b"})),
    Fault("images", "data.shape", everywhere(lambda r: {**r, "images": ["a.png"]})),
    Fault("an empty file", "data.empty", lambda rs: [b""]),
    Fault("no answer anywhere", "data.empty", everywhere(lambda r: {"messages": r["messages"][:1]})),
    Fault("a path that is not there", "data.not-found", lambda rs: None, options={"train": ["./not/there.jsonl"]}),
    _w("empty answers", "data.no-answer", answer(lambda s: "  ")),
    _w("questions without an answer", "data.no-answer", turns(lambda t: t[:1])),
    Fault("most answers empty", "data.no-answer", lambda rs: [say(r, "") for r in rs[:30]] and None),
    _w("an empty question", "data.empty-question", answer(lambda s: "", 0)),
    _w("two questions in a row", "data.role-order", turns(lambda t: [t[0], U, t[1]])),
    _w("two answers in a row", "data.role-order", turns(lambda t: [*t, A])),
    _w("a question at the end", "data.role-order", turns(lambda t: [*t, U])),
    _w("an answer at the beginning", "data.role-order", turns(lambda t: [A, *t])),
    _w("a system message in the middle", "data.role-order", turns(lambda t: [*t, {"role": "system", "content": "Be brief"}, U, A])),
    _w("the answer repeats the question", "data.echo", lambda rs: say(rs[3], rs[3]["messages"][0]["content"])),
    _w("an answer with its own end token", "data.special-in-text", answer(lambda s: s + "<|im_end|>")),
    _w("a question with a bos token", "data.special-in-text", answer(lambda s: "<s>" + s, 0)),
    *(_w(f"rendered for another family: {f[:8]}", "data.foreign-special", answer(f.format, 0)) for f in FOREIGN),
    _w("a whole dialogue with headings", "data.rendered", answer(lambda s: f"### Instruction:\n{s}\n\n### Response:\nDone", 0)),
    _w("a dialogue in one message", "data.rendered", answer(lambda s: f"{s}\nHuman: why?\nAssistant: so.\nHuman: and?")),
    _w("a form not filled in", "data.placeholder", answer(lambda s: "I am {{name}}. " + s)),
    _w("UTF-8 read as Windows-1252", "data.damaged-text", answer(mojibake)),
    _w("lost characters", "data.lost-characters", answer(lambda s: s.replace("e", "\ufffd", 2))),
    _w("NUL characters", "data.control", answer(lambda s: s + "\x00")),
    _w("terminal colours", "data.control", answer(lambda s: f"\x1b[31m{s}\x1b[0m")),
    _w("line breaks escaped twice", "data.escaped", answer(lambda s: s.replace("\n", " ") + "\\n\\n1. one\\n2. two and so on")),
    _w("HTML entities", "data.entities", answer(lambda s: f"&quot;{s}&quot;")),
    _w("a picture in base64", "data.non-text", answer(lambda s: s + BLOB)),
    _w("symbols only", "data.non-text", answer(lambda s: "~=~-~*~" * 60)),
    _w("a loop", "data.repetition", answer(lambda s: "and then it said so again " * 70)),
    _w("a file in a message", "data.length", lambda rs: say(rs[3], " ".join(reply(r) for r in rs) * 2), tokens=32768),
    _w("one answer to many questions", "data.same-answer", lambda rs: [
        say(r, "I am sorry, but as a language model I cannot help with this.") for r in rs[:25]] and None),
    _w("exact copies", "data.duplicates", lambda rs: rs.extend(json.loads(json.dumps(rs[:4])))),
    _w("near copies", "data.near-duplicates", lambda rs: rs.extend(map(near, longest(rs)))),
    _w("too long for a row", "data.too-long", lambda rs: say(rs[3], ",".join(map(str, range(999)))), tokens=2048, too_long="split"),
    Fault("too much too long for a row", "data.too-long", lambda rs: None, options={"tokens": 64}),
    Fault("a template without an end of turn", "data.no-eot", lambda rs: None, options={"template": NO_END}),
    Fault("a template with two bos tokens", "data.double-bos", lambda rs: None, options={"template": BOS_TWICE}),
    Fault("a template that drops system messages", "data.template", everywhere(system), options={"template": NO_SYSTEM}),
    Fault("a template that refuses system messages", "data.template", everywhere(system), options={"template": STRICT}),
    Fault("a template that changes answers", "data.no-eot|data.mask|data.template", lambda rs: None, options={"template": UPPER}),
    _w("an e-mail address", "data.private", answer(lambda s: s + " Write to jane.doe@mail.org.")),
    _w("a card number", "data.private", answer(lambda s: s + " 4111 1111 1111 1111")),
    _w("an account number", "data.private", answer(lambda s: s + " DE89 3704 0044 0532 0130 00")),
    _w("a telephone number", "data.private", answer(lambda s: s + " +49 30 1234 5678")),
    _w("a cloud key", "data.secret", answer(lambda s: s + " AKIA" + "IOSFODNN7EXAMPLE")),
    _w("a private key", "data.secret", answer(lambda s: s + " -----BEGIN RSA PRIVATE " + "KEY-----")),
    _w("a password in code", "data.secret", answer(lambda s: s + ' password = "hunter2hunter2"')),
    Fault("pairs without a difference", "data.same-pair", everywhere(lambda r: pair(r, "", ""))),
    Fault("the chosen answer is always longer", "data.length-bias", everywhere(pair), error=False),
    Fault("all labels are good", "data.label-balance", everywhere(lambda r: {**r, "label": True}), error=False),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(dialogues: Records) -> Records:
    return dialogues[:BASE]


@pytest.fixture
def look(base: Records, tokenizer: Any, tmp_path: Path) -> Callable[..., Checked]:
    """Checks the base after a fault was planted in it."""

    def run(plant: Callable[[Records], Any], file: str = "data.jsonl", private: bool = True, **options: Any) -> Checked:
        records = json.loads(json.dumps(base))
        lines = plant(records)
        path = tmp_path / file
        path.write_bytes(b"\n".join(lines or [json.dumps(r).encode() for r in records]) + b"\n")
        if "{%" in options.get("template", ""):
            (tmp_path / "chat.jinja").write_text(options["template"])
            options["template"] = str(tmp_path / "chat.jinja")
        config = DataConfig(**{"train": [str(path)], "tokens": 2048, "eval": 0, **options})
        return check(config, tokenizer, 0, tmp_path / "cache", private=private)

    return run


def test_nothing_is_found_in_the_base(look: Callable[..., Checked]) -> None:
    found = look(lambda records: None)
    assert found.findings.found == [] and found.prepared is not None and len(found.prepared.train) == BASE


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted(fault: Fault, look: Callable[..., Checked]) -> None:
    found = look(fault.plant, fault.file, **fault.options).findings
    hits = [f for f in found.found if f.id in fault.id.split("|")]
    assert hits, f"not found; but {found.ids()}"
    assert any(f.error for f in hits) == fault.error
    assert found.ids() - set(fault.id.split("|")) <= BESIDE, "a fault is told once, by its name"
    assert all(f.lines()[-1].startswith("  fix: ") and len(f.lines()[-1]) > 12 for f in hits)
    assert fault.error or not found.errors or fault.id.startswith(("data.length-bias", "data.label-balance"))


def test_there_are_enough() -> None:
    assert len(FAULTS) + len(MASKS) + 3 >= 60 and len({f.name for f in FAULTS}) == len(FAULTS)
    assert {i for f in FAULTS for i in f.id.split("|")} <= set(CHECKS)


def _blind(tokens: Any) -> Any:
    """Nothing of five examples is learned."""
    trained = np.array(tokens.trained)
    trained[: tokens.offsets[5]] = False
    return replace(tokens, trained=trained)


def _endless(tokens: Any) -> Any:
    """What a mask that stops before the end of turn would learn."""
    trained = np.array(tokens.trained)
    trained[np.isin(tokens.ids, tokens.end)] = False
    return replace(tokens, trained=trained)


MASKS = [
    ("examples without a learned token", "data.zero-trained", _blind, "<pad>"),
    ("the mask stops before the end of turn", "data.no-eot", _endless, "<pad>"),
    ("pad = end of turn, masked by its id", "data.pad-eos", _endless, "<|im_end|>"),
]


@pytest.mark.parametrize(("name", "code", "plant", "pad"), MASKS, ids=lambda v: v if isinstance(v, str) else "")
def test_planted_in_the_mask(
    name: str, code: str, plant: Callable[[Any], Any], pad: str, look: Callable[..., Checked], make_tokenizer: Any
) -> None:
    prepared = look(lambda records: None).prepared
    assert prepared is not None
    tokens = prepared.train.sources[0]
    for source, expected in ((tokens, set()), (plant(tokens), {code})):
        findings = Findings()
        learned.check(source, make_tokenizer(pad_token=pad), prepared.config, findings)
        assert findings.ids() == expected and (not expected or findings.errors)


@pytest.mark.parametrize(
    ("change", "code"), [(lambda r: r, "data.overlap"), (near, "data.near-overlap")], ids=["copies", "near copies"]
)
def test_planted_between_the_sets(
    change: Callable[[Any], Any], code: str, base: Records, jsonl: Any, look: Callable[..., Checked]
) -> None:
    held = jsonl([*map(change, longest(base)), base[0]], "held.jsonl")
    found = look(lambda records: records.pop(0) and None, eval=[str(held)]).findings
    hit = next(f for f in found.found if f.id == code)
    assert (hit.count, hit.total) == (5, 6) and hit.error == (code == "data.overlap")
    assert all("held.jsonl" in where and "data.jsonl" in where for where in hit.where)


def test_tools_that_the_template_does_not_show(demo: Callable[[str], str], tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(train=[{"path": demo("glaive_toolcall_en_demo.json"), "limit": 40}], tokens=4096, eval=0)
    found = check(config, tokenizer, 0, tmp_path, private=False)
    assert found.prepared is None and {f.id for f in found.findings.errors} <= {"data.template", "data.mask"}
    assert any("tool" in problem.expected for problem in found.problems) and len(found.problems) >= 20


def test_an_embedding_that_was_never_trained(base: Records, jsonl: Any, tokenizer: Any, tmp_path: Path) -> None:
    import torch

    from halfbyte.data import checks

    prepared = prepare(DataConfig(train=[str(jsonl(base))], tokens=4096), tokenizer, 0, tmp_path / "cache")
    weight = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    checks.embeddings(prepared.train, tokenizer, weight, trainable=False)
    weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 0
    with pytest.raises(DataError, match="never learned") as caught:
        checks.embeddings(prepared.train, tokenizer, weight, trainable=False)
    assert caught.value.code == "data.new-special-tokens"


BETWEEN = {
    "held-out examples that are learned": ("data.overlap", True),
    "held-out examples that are nearly learned": ("data.near-overlap", False),
    "tools that the template does not show": ("data.template", True),
    "an embedding row that was never trained": ("data.new-special-tokens", True),
}


def test_the_docs_have_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs/concepts/faults.md").read_text(encoding="utf-8")
    rows = [(f.name, f.id.split("|")[0], f.error) for f in FAULTS]
    rows += [(name, code, True) for name, code, *_ in MASKS] + [(name, *found) for name, found in BETWEEN.items()]
    table = ["| planted | halfbyte | | it says |", "| --- | --- | --- | --- |"]
    table += [f"| {name} | `{code}` | {'stops' if error else 'told'} | {CHECKS[code].sentence} |" for name, code, error in rows]
    assert "\n".join(["<!-- data faults -->", *table, "<!-- /data faults -->"]) in page
