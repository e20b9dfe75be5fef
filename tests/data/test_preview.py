"""The preview shows what is learned, with and without colour."""

from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import prepare
from halfbyte.data.preview import of, pieces, render, renderable


def test_rendered_without_colour(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Any) -> None:
    records = [chat("What is it?", f"It is a cat {i}.") for i in range(5)]
    prepared = prepare(DataConfig(train=[str(jsonl(records))], tokens=128), tokenizer, 0, tmp_path)
    out = io.StringIO()
    Console(file=out, width=100, no_color=True).print(renderable(of(prepared, tokenizer, 2, 0)))
    text = out.getvalue()
    assert text.count("⟦It is a cat") == 2 and "<|im_start|>assistant⏎" in text and ".<|im_end|>⟧" in text
    for word in ("rows of 128 tokens", "row 1: 4 documents of", "left over (no loss)", "eval: data", "longest", "data.jsonl:"):
        assert word in text


def test_a_narrow_terminal_cuts_no_number(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Any) -> None:
    prepared = prepare(
        DataConfig(train=[str(jsonl([chat("What?", f"A cat {i}.") for i in range(5)]))], tokens=128), tokenizer, 0, tmp_path
    )
    shown = of(prepared, tokenizer, 1, 0)
    for width in (100, 40):
        out = io.StringIO()
        render(shown, Console(file=out, width=width, no_color=True))
        told = " ".join(out.getvalue().split("learned tokens are")[0].split("lengths in tokens")[1].split())
        assert f"{prepared.train.tokens():,}" in told and "longest" in told and "…" not in told, told
        assert max(map(len, out.getvalue().splitlines())) <= width
        bars = [line for line in out.getvalue().splitlines() if line.startswith("█")]
        assert [len(bar) for bar in bars] == [min(96, width)] * len(shown.rows)


def test_tokens_of_one_character_are_shown_together(tokenizer: Any) -> None:
    ids = tokenizer("a二b").input_ids
    found = pieces(ids, [False] * len(ids), tokenizer)
    assert [p.text for p in found] == ["a", "二", "b"] and [i for p in found for i in p.ids] == ids


def test_long_examples_are_shortened_and_structured_ones_are_not(tokenizer: Any, jsonl: Any, tmp_path: Any) -> None:
    prepared = prepare(DataConfig(train=[str(jsonl([{"text": "x y " * 500}]))], eval=0, tokens=128), tokenizer, 0, tmp_path)
    out = io.StringIO()
    preview = of(prepared, tokenizer, 1, 0)
    Console(file=out, width=100).print(renderable(preview))
    shown = preview.examples[0]
    assert "tokens ..." in out.getvalue() and len(shown.pieces) == shown.tokens == shown.trained + 1


def test_as_data(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Any) -> None:
    prepared = prepare(DataConfig(train=[str(jsonl([chat("One?", "two")]))], eval=0, tokens=64), tokenizer, 0, tmp_path)
    found = json.loads(json.dumps(of(prepared, tokenizer, 5, 0).as_dict()))
    example = found["examples"][0]
    assert "".join(p["text"] for p in example["pieces"] if p["trained"]) == "two<|im_end|>"
    assert sum(len(p["ids"]) for p in example["pieces"]) == example["tokens"] == found["rows"][0]["tokens"][0]
    assert found["rows"][0]["left"] == 64 - example["tokens"] and found["rows"][0]["trained"] == [example["trained"]]
    assert found["rows"][0]["example_ids"] == [0] and found["lengths"][0]["learned"] == example["trained"]
    assert found["template"]["text"] == tokenizer.chat_template and found["report"]["sources"][0]["examples"] == 1


def test_weights_are_told_where_they_are_not_1(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Any) -> None:
    weighted = chat("One?", "two", "Three?", "four", "Five?", "six")
    for turn, weight in ((1, 0.1), (3, 2), (5, 0)):
        weighted["messages"][turn]["weight"] = weight
    config = DataConfig(train=[str(jsonl([weighted]))], eval=0, tokens=128)
    shown = of(prepare(config, tokenizer, 0, tmp_path), tokenizer, 1, 0)
    out = io.StringIO()
    Console(file=out, width=100, no_color=True).print(renderable(shown))
    for word in ("⟦0.1x two<|im_end|>⟧", "⟦2x four<|im_end|>⟧", "less than 1 is yellow"):
        assert word in out.getvalue()
    assert "six<|im_end|>⟧" not in out.getvalue() and out.getvalue().count("⟦") == 4  # two in the legend
    pieces = shown.as_dict()["examples"][0]["pieces"]
    assert {(p["weight"], p["trained"]) for p in pieces} == {(1.0, False), (0.1, True), (2.0, True)}
    plain = io.StringIO()
    one = of(
        prepare(DataConfig(train=[str(jsonl([chat("One?", "two")], "b.jsonl"))], eval=0, tokens=128), tokenizer, 0, tmp_path),
        tokenizer,
        1,
        0,
    )
    Console(file=plain, width=100, no_color=True).print(renderable(one))
    assert "yellow" not in plain.getvalue() and "⟦two<|im_end|>⟧" in plain.getvalue()


def test_neighbours_of_another_weight_stay_apart(tokenizer: Any) -> None:
    """Tokens of one answer may weigh differently; a character of several tokens is cut where they do."""
    ids = tokenizer("ab").input_ids
    found = pieces(ids * 2, [True] * 4, tokenizer, [1, 1, 0.5, 0.5])
    assert [(p.text, p.weight) for p in found] == [("a", 1), ("b", 1), ("a", 0.5), ("b", 0.5)]
