# ruff: noqa: RUF001
"""What is right stays unflagged: real data in the shapes, files, languages and options that people use, without one finding."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from halfbyte.data.check.run import check
from halfbyte.data.config import DataConfig

Records = list[dict[str, Any]]
BASE = 40
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREETINGS = {
    "French": "Où est la bibliothèque ? À côté du café, dans l’hôtel « Bellevue ».",
    "German": "Größe und Maße stehen auf der Rückseite – bitte prüfen Sie „alles“ noch einmal.",
    "Polish": "Zażółć gęślą jaźń, a potem źdźbło trawy.",
    "Vietnamese": "Tiếng Việt có nhiều dấu thanh: sắc, huyền, hỏi, ngã, nặng.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Arabic": "اللغة العربية تكتب من اليمين إلى اليسار.",
    "Hebrew": "שלום עולם, מה שלומך היום?",
    "Hindi": "क्‍या आप हिन्दी पढ़ सकते हैं?",
    "Thai": "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "Japanese": "吾輩は猫である。名前はまだ無い。",
    "Korean": "모든 인간은 태어날 때부터 자유롭다.",
    "emoji": "Well done! 👩‍👩‍👧‍👦 🇪🇺 ✅ 👍🏽 – see you ☕️",
    "mathematics": "∀ε > 0 ∃δ > 0: |x − a| < δ ⇒ |f(x) − f(a)| < ε, with ∑ᵢ xᵢ² ≤ ½ and ∂f/∂x ≈ 3·10⁻⁷.",
}
ANSWERS = {
    "Python": "```python\ndef f(x: dict[str, int]) -> str:\n    return f'{x[\"a\"]}\\n'\n```",
    "HTML": '<div class="a"><del>old</del> <b>new</b> &amp; more &lt;tags&gt;</div>',
    "JSON": '{"name": "Ada", "roles": ["user", "assistant"], "nested": {"a": [1, 2, 3]}}',
    "Jinja": "Write `{{ user.name | upper }}` and `{% for x in y %}`; `{{}}` is empty.",
    "shell": "$ ls -la | grep '^d' && echo \"$HOME\" > /tmp/x\n\tdone",
    "a regular expression": r"Use `^\s*(?:\d{3}-)?\w+\n?$`: it matches a line.",
    "a table": "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |",
    "a drawing": "```\n+-----+     +-----+\n|  a  |---->|  b  |\n+-----+     +-----+\n" + "|     |\n" * 20 + "```",
    "a list": "\n".join(f"{i}. point number {i}" for i in range(1, 40)),
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765, 10946",
    "an interview": "Q: Who are you?\nA: A model, and nothing else.",
    "examples in the question": "Q: 1 + 1?\nA: 2\nQ: 1 + 2?\nA: 3\nQ: 2 + 2?",
    "a heading": "### Response to the letter\nDear Ms Smith, thank you.",
    "an address": "See https://example.org/a/b?c=d&e=f#g, or write to me@example.com in 2024-05-06.",
    "one word": "Yes.",
}


class Clean(NamedTuple):
    """A form of the base: what becomes of the records (or the bytes of the file), and the options."""

    name: str
    form: Callable[[Records], Any]
    file: str = "data.jsonl"
    options: Mapping[str, Any] = MappingProxyType({})


def question(record: dict[str, Any]) -> str:
    return str(record["messages"][0]["content"])


def reply(record: dict[str, Any]) -> str:
    return str(record["messages"][1]["content"])


def each(change: Callable[[dict[str, Any]], Any]) -> Callable[[Records], Any]:
    return lambda records: [change(r) for r in records]


def answered(text: str) -> Callable[[Records], Any]:
    """Five answers in another language or kind of text, each a little different."""

    def form(records: Records) -> Records:
        for number, record in enumerate(records[:5]):
            record["messages"][1]["content"] = text if number == 0 else f"{reply(record)}\n\n{text}"
        return records

    return form


def table(records: Records, separator: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([["instruction", "output"], *([question(r), reply(r)] for r in records)])
    return out.getvalue().encode()


def sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question(record)}, {"from": "gpt", "value": reply(record)}]}


def parts(record: dict[str, Any]) -> dict[str, Any]:
    """Content as a list of parts."""
    return {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in record["messages"]]}


def joined(records: Records) -> Records:
    """Dialogues of four turns."""
    return [{"messages": a["messages"] + b["messages"]} for a, b in zip(records[::2], records[1::2], strict=True)]


def lines(records: Records) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def before(content: str, role: str = "system") -> Callable[[Records], Any]:
    return each(lambda r: {"messages": [{"role": role, "content": content}, *r["messages"]]})


def same(records: Records) -> Records:
    return records


def labelled(records: Records) -> Records:
    """Classification: few short answers to many questions."""
    for number, record in enumerate(records):
        record["messages"][1]["content"] = ("positive", "negative", "neutral")[number % 3]
    return records


CLEAN = [
    Clean("messages", same),
    Clean("ShareGPT", each(sharegpt)),
    Clean("Alpaca", each(lambda r: {"instruction": question(r), "input": "", "output": reply(r)})),
    Clean("Alpaca with history", each(lambda r: {"instruction": question(r), "output": reply(r), "history": [["Hello!", "Yes?"]]})),
    Clean("prompt and completion", each(lambda r: {"prompt": f"Q. {question(r)}\n", "completion": reply(r)})),
    Clean("prompt and completion as messages", each(lambda r: {"prompt": r["messages"][:1], "completion": r["messages"][1:]})),
    Clean("plain text", each(lambda r: {"text": f"{question(r)}\n\n{reply(r)}"})),
    Clean("roles in capitals", each(lambda r: {"messages": [{**m, "role": m["role"].upper()} for m in r["messages"]]})),
    Clean("parts of content", each(parts)),
    Clean("four turns", joined),
    Clean("system messages", before("You answer in one sentence.")),
    Clean("developer messages", before("You answer in one sentence.", "developer")),
    Clean("other columns", each(lambda r: {**r, "id": "x", "score": 0.5, "tags": ["a"]})),
    Clean("an array over lines", lambda rs: json.dumps(rs, indent=2).encode(), "data.json"),
    Clean("CSV", table, "data.csv"),
    Clean("TSV", lambda rs: table(rs, "\t"), "data.tsv"),
    Clean("gzip", lambda rs: gzip.compress(lines(rs)), "data.jsonl.gz"),
    Clean("a text file", lambda rs: "\n\n".join(reply(r).replace("\n\n", "\n") for r in rs).encode(), "data.txt"),
    Clean("Markdown", lambda rs: "\n\n".join(f"# {question(r)}\n\n{reply(r)}" for r in rs).encode(), "data.md"),
    Clean("a byte order mark", lambda rs: b"\xef\xbb\xbf" + lines(rs)),
    Clean("Windows line ends", lambda rs: lines(rs).replace(b"\n", b"\r\n")),
    Clean("blank lines between", lambda rs: lines(rs).replace(b"\n", b"\n\n")),
    Clean("escaped Unicode", lambda rs: b"".join(json.dumps(r).encode() + b"\n" for r in answered(GREETINGS["Russian"])(rs))),
    *(Clean(name, answered(text)) for name, text in GREETINGS.items()),
    *(Clean(f"an answer with {name}", answered(text)) for name, text in ANSWERS.items()),
    Clean("labels as answers", labelled),
    Clean("the last answer only", joined, options={"loss_on": "last"}),
    Clean("each answer an example", joined, options={"loss_on": "each"}),
    Clean("loss on questions and answers", joined, options={"loss_on": ["user", "assistant"]}),
    Clean("loss on everything", same, options={"loss_on": "all"}),
    Clean("a system message from the recipe", same, options={"system": "Be kind."}),
    Clean("the Alpaca template", same, options={"template": "alpaca"}),
    Clean("the plain template", joined, options={"template": "plain"}),
    Clean("a template that marks answers", joined, options={"template": MARKED}),
    Clean("Llama 3's headers", joined, options={"template": LLAMA3}),
    Clean("a held-out share", same, options={"eval": 0.1}),
    Clean("a limit", same, options={"limit": 25}),
    Clean("long text cut to rows", lambda rs: "\n\n".join(reply(r) for r in rs).encode(), "data.md", {"tokens": 256}),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(dialogues: Records) -> Records:
    return dialogues[100 : 100 + BASE]


def test_there_are_enough() -> None:
    assert len({c.name for c in CLEAN}) == len(CLEAN) >= 40


@pytest.mark.parametrize("clean", CLEAN, ids=lambda c: c.name)
def test_nothing_is_found(clean: Clean, base: Records, make_tokenizer: Any, tmp_path: Path) -> None:
    made = clean.form(json.loads(json.dumps(base)))
    path = tmp_path / clean.file
    path.write_bytes(made if isinstance(made, bytes) else lines(made))
    options = dict(clean.options)
    limit = {"limit": options.pop("limit")} if "limit" in options else {}
    specials: tuple[str, ...] = ()
    if "{%" in options.get("template", ""):
        (tmp_path / "chat.jinja").write_text(options["template"])
        specials = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>") if options["template"] == LLAMA3 else ()
        options["template"] = str(tmp_path / "chat.jinja")
    config = DataConfig(**{"train": [{"path": str(path), **limit}], "tokens": 2048, "eval": 0, **options})
    found = check(config, make_tokenizer(specials=specials), 0, tmp_path / "cache", private=True)
    assert found.findings.found == [], found.findings.lines()
    assert found.prepared is not None and len(found.prepared.train)


@pytest.mark.parametrize("name", ["alpaca_zh_demo.json", "wiki_demo.txt"])
def test_other_real_sets(name: str, demo: Callable[[str], str], tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(train=[{"path": demo(name), "limit": 8}], tokens=8192, eval=0)
    assert check(config, tokenizer, 0, tmp_path, private=True).findings.found == []
