"""Mistakes to plant, one at a time, in real data: what is done to the records, and the id under which halfbyte tells it.

The base is 40 dialogues of a public set in which nothing is found; every fault changes a few of them, the file, or the template,
and leaves the rest as it was. `test_faults.py` shows them to halfbyte, `bench/faults_peers.py` to other trainers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

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


def dialogues(folder: Path) -> Records:
    """Records of shape `messages` from the public set in a folder: distinct, of usual length."""
    records = json.loads((folder / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    chosen = [r for r in records if 60 < len(r["output"]) < 600 and not r["input"] and "@" not in r["output"]]
    return [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]} for r in chosen
    ]


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


def content(fault: Fault, records: Records) -> bytes:
    """The file of a fault planted in a copy of the records."""
    copies = json.loads(json.dumps(records))
    lines = fault.plant(copies)
    return b"\n".join(lines or [json.dumps(r).encode() for r in copies]) + b"\n"
