"""The page for a browser: what the data holds stays data, nothing is asked for from anywhere, the numbers are those of the run."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.config import DataConfig
from halfbyte.data.page import collect, write

EVIL = [
    "</script><script>alert(1)</script>",
    "<!-- <script> --> ]]>",
    "<img src=x onerror=alert(2)>",
    "@@data@@ @@js@@ @@title@@ ${x} `y` \\u003c/script>",
    "line\u2028and paragraph\u2029 &amp; &lt;b&gt; \"'",
    "二 is two, é is e, 👍🏽 is a thumb",
]


class Reader(HTMLParser):
    """What a browser would make of a page: its elements, and the text of its data block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        self.data += data if self._inside else ""


@pytest.fixture
def made(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path) -> tuple[str, dict[str, Any], DataConfig]:
    records = [chat(f"Say {text}", f"{text}, and done {i}.") for i, text in enumerate(EVIL)]
    records += [chat(f"What is {i}?", "It is " + "very " * i + "good.") for i in range(24)] + [
        chat("Twice?", "Twice and twice.")
    ] * 3
    config = DataConfig(train=[str(jsonl(records))], eval=0, tokens=256)
    write.page(config, tokenizer, 0, tmp_path / "page.html", title="<b>x</b> & @@data@@", examples=40, cache=tmp_path / "cache")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    return text, json.loads(Reader(text).data), config


def test_data_cannot_leave_its_block(made: tuple[str, dict[str, Any], DataConfig]) -> None:
    text, data, _ = made
    page = Reader(text)
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert [s.get("type") for s in scripts] == ["application/json", None] and text.count("</script>") == 2
    assert not set("<>&") & set(page.data) and page.data.isascii()
    assert not [a for _, attributes in page.elements for a in attributes if a in ("src", "href") or a.startswith("on")]
    assert (
        "default-src 'none'" in text and "http://www.w3.org/2000/svg" in text and text.count("http") == text.count("http-equiv") + 1
    )
    assert "innerHTML" not in text and "<title>&lt;b&gt;x&lt;/b&gt; &amp; @@data@@ - data</title>" in text
    assert data["title"] == "<b>x</b> & @@data@@"


def spelt(data: dict[str, Any], example: dict[str, Any]) -> tuple[str, str, int]:
    """The text of an example, what of it is learned, and its tokens, as the page's script puts them together."""
    learned = [number % 2 == 1 for number, run in enumerate(example["r"]) for _ in range(run)]
    pieces = [(p[1], len(p[0])) if isinstance(p, list) else (data["texts"][str(-p - 1 if p < 0 else p)], 1) for p in example["p"]]
    answer = "".join(text for (text, _), yes in zip(pieces, learned, strict=True) if yes)
    return "".join(text for text, _ in pieces), answer, sum(count for _, count in pieces)


def test_every_token_is_there(made: tuple[str, dict[str, Any], DataConfig]) -> None:
    _, data, _ = made
    assert len(data["examples"]) == data["examplesInAll"] == 33
    found = {spelt(data, example)[0]: spelt(data, example) for example in data["examples"]}
    for i, text in enumerate(EVIL):
        want = f"<|im_start|>user\nSay {text}<|im_end|>\n<|im_start|>assistant\n{text}, and done {i}.<|im_end|>\n"
        assert found[want][1] == f"{text}, and done {i}.<|im_end|>"
    for example in data["examples"]:
        assert spelt(data, example)[2] == example["n"] and 0 < example["t"] < example["n"] and not example["cut"]


def test_numbers(made: tuple[str, dict[str, Any], DataConfig]) -> None:
    _, data, config = made
    sizes = [e["n"] for e in data["examples"]]
    tokens = data["tokens"]
    assert sum(data["histogram"]["counts"]) == 33 and data["histogram"]["longest"] == max(sizes)
    assert tokens["all"] == sum(sizes) == data["lengths"][0][2]
    ends = next(entry for entry in tokens["special"] if entry[1] == "<|im_end|>")
    assert ends[3] == 66 and ends[4] == 33
    for row in data["rows"]:
        assert sum(doc["n"] for doc in row["docs"]) + row["left"] == config.tokens
        assert all(data["examples"][doc["x"]]["w"] == doc["w"] for doc in row["docs"])
    assert len(data["rows"]) == data["rowsInAll"] and {d["x"] for r in data["rows"] for d in r["docs"]} == set(range(33))
    assert (data["twins"][0]["count"], data["twins"][0]["exact"]) == (3, True)
    assert {f["id"] for f in data["findings"]} >= {"data.duplicates"} and data["template"]["name"] == "auto"


def test_large_examples_and_sets_are_cut(tokenizer: Any, jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "TOKENS_SHOWN", 50)
    monkeypatch.setattr(collect, "BUDGET", 120)
    config = DataConfig(train=[str(jsonl([{"text": f"{i} x y " * 100} for i in range(9)]))], eval=0, tokens=256)
    data = collect.of(config, tokenizer, 0, tmp_path / "cache", 9)
    assert len(data["examples"]) == 3 and all(spelt(data, e)[2] + e["cut"] == e["n"] for e in data["examples"])


def test_weights_of_tokens(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path) -> None:
    """Runs of pieces with their weight, only where some weigh other than 1."""
    records = [{**chat("One?", "two", "Three?", "four"), "w": w} for w in (1, 2, 0.1)]
    records[1]["messages"][1]["weight"] = 0.5
    config = DataConfig(train=[{"path": str(jsonl(records)), "columns": {"weight": "w"}}], eval=0, tokens=256)
    data = collect.of(config, tokenizer, 0, tmp_path / "cache", 9)
    found = {e["w"].rpartition(":")[2]: e for e in data["examples"]}
    assert "k" not in found["1"]
    for line, wanted in (("2", {"two<|im_end|>": 1, "four<|im_end|>": 2}), ("3", {"two<|im_end|>": 0.1, "four<|im_end|>": 0.1})):
        example = found[line]
        weights = [weight for count, weight in example["k"] for _ in range(count)]
        learned = [number % 2 == 1 for number, run in enumerate(example["r"]) for _ in range(run)]
        assert len(weights) == len(learned) == len(example["p"])
        texts = [p[1] if isinstance(p, list) else data["texts"][str(-p - 1 if p < 0 else p)] for p in example["p"]]
        said: dict[str, float] = {}
        for text, weight, yes, before in zip(texts, weights, learned, [False, *learned], strict=False):
            if yes:
                last = said.popitem()[0] + text if before else text
                said[last] = weight
        assert said == wanted
        assert {w for w, yes in zip(weights, learned, strict=True) if not yes} == {1}
