"""The guide of the data section says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import files, templates
from halfbyte.data.check.findings import CHECKS
from halfbyte.data.shapes import COLUMNS

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guides/data.md").read_text(encoding="utf-8")


def test_every_id_is_explained() -> None:
    code = "".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "src/halfbyte/data").rglob("*.py")))
    raised = set(re.findall(r"\"(data\.[a-z-]+)\"", code))
    assert len(raised) >= 40 and raised - {"data.exists", "data.worker"} == set(CHECKS)  # two are not about data
    pages = [
        GUIDE,
        *((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("guides/data-check.md", "concepts/faults.md")),
    ]
    explained = {i for page in pages for i in re.findall(r"`(data\.[a-z-]+)`", page)}
    assert {i for i in explained if "-" in i} <= raised


def test_endings_shapes_and_templates_are_listed() -> None:
    for word in (*files.SUFFIXES, *files.COMPRESSED, *COLUMNS, *templates.NAMED):
        assert word in GUIDE, word


def test_the_example_runs(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl([chat(f"One {i}?", "two") for i in range(30)], "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)[0], names)
    assert names["batch"].input_ids.shape == (8, 2048)
