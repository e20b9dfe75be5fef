"""Which tokens stop an answer, read off the tokens that were learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.golden import fitted
from data.test_golden import CHANNELS, UNCLOSED
from halfbyte.data import stops as module
from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import prepare

ASK = {"role": "user", "content": "One?"}
SAY = {"role": "assistant", "content": "two"}


@pytest.mark.parametrize(
    ("name", "text", "turns", "wanted"),
    [
        # An end that closes a thought is no end of an answer, although it ends earlier answers too.
        ("gptoss channels", CHANNELS, [[ASK, SAY | {"thinking": "hm"}]], {"<|return|>"}),
        ("gptoss channels", CHANNELS, [[ASK, SAY], [ASK, SAY, ASK, SAY]], {"<|return|>", "<|end|>"}),
        ("glm unclosed", UNCLOSED, [[ASK, SAY], [ASK, SAY, ASK, SAY]], {"<|user|>"}),
    ],
)
def test_ends(
    name: str, text: str, turns: list[Any], wanted: set[str], make_tokenizer: Callable[..., Any], jsonl: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tokenizer = fitted(make_tokenizer(), name, text)
    (tmp_path / "t.jinja").write_text(text)
    path = jsonl([{"messages": talk} for talk in turns])
    config = DataConfig(train=str(path), eval=0, tokens=256, template=str(tmp_path / "t.jinja"))
    prepared = prepare(config, tokenizer, 0, tmp_path / "cache")
    ids = {tokenizer.convert_tokens_to_ids(token) for token in wanted}
    assert set(prepared.end_ids) == ids | {tokenizer.eos_token_id}
    for chunk in (1, 2, 7):  # wherever the tokens are cut
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert module.stops(prepared.train.sources[0]) == ids


def test_nothing_else_is_left(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path) -> None:
    """Plain text shows no end of an answer: the tokenizer's own is all there is."""
    path = jsonl([{"text": "The quick brown fox."}])
    prepared = prepare(DataConfig(train=str(path), eval=0, tokens=64), tokenizer, 0, tmp_path / "cache")
    assert prepared.end_ids == (tokenizer.eos_token_id,)
