"""Alignment: the bytes of tokens are what decoding gives, spans are found by their ends, and what is not spelled is not given."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.aligned import Aligned, Aligner


def spelled(aligner: Aligner, found: Aligned) -> list[str]:
    assert found.runs is not None
    return [aligner.decode(found.ids[a:b]) for a, b in found.runs]


def test_the_table_of_bytes_is_what_decoding_gives(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(specials=("<|a b|>", "é", "<\u0143>"))
    aligner = Aligner(tokenizer)
    assert aligner._bytes is not None and len(aligner._bytes) == len(tokenizer)
    for number, spelling in enumerate(aligner._bytes):
        assert aligner.decode([number]) == spelling.decode("utf-8", "replace"), number


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=4), st.text(max_size=6))
def test_every_span_is_spelled(tokenizer: Any, answers: list[str], between: str) -> None:
    aligner = Aligner(tokenizer)
    text, spans = "", []
    for answer in answers:
        text += f"{between}<|im_start|>assistant\n"
        spans.append((len(text), len(text) + len(answer) + len("<|im_end|>")))
        text += f"{answer}<|im_end|>"
    (found,) = aligner([text], [spans])
    assert spelled(aligner, found) == [text[a:b] for a, b in spans]


@pytest.mark.parametrize(("text", "span"), [("A: two</s>", (3, 10)), ("A:\n\n\nkind</s>", (4, 13)), ("A: \u0301e</s>", (2, 8))])
def test_a_token_across_the_beginning_is_cut(text: str, span: tuple[int, int], tokenizer: Any) -> None:
    aligner = Aligner(tokenizer)
    (found,) = aligner([text], [[span]])
    assert spelled(aligner, found) == [text[slice(*span)]] and aligner.decode(found.ids) == text


def test_what_is_not_spelled_is_not_given(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    aligner = Aligner(tokenizer)
    monkeypatch.setattr(aligner, "_bytes", [b"?"] * len(tokenizer))
    monkeypatch.setattr(aligner, "decode", lambda ids: f"{len(ids)} of them, {id(ids)}")
    assert aligner(["One<|im_end|>"], [[(0, 13)]])[0].runs is None
    assert aligner(["One<|im_end|>"], [None])[0].runs == []
