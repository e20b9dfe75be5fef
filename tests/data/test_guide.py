"""The guide of the data section says what the code does."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.data import files, templates
from halfbyte.data.check.findings import CHECKS
from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import prepare
from halfbyte.data.shapes import COLUMNS
from halfbyte.errors import DataError
from halfbyte.recipe import recipe_from

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


def blocks(kind: str, title: str) -> list[str]:
    """The code blocks of a section, without the indent of a list."""
    section = GUIDE.split(f"## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", section, flags=re.S | re.M)
    return [textwrap.dedent(text) for name, text in found if name == kind]


def test_the_ten_minutes(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export as it is printed, the recipe as it is printed, the error that is promised, and what mends it."""
    monkeypatch.chdir(tmp_path)
    title = "From a chat export to a checked set, in ten minutes"
    (export,), (text,) = blocks("json", title), blocks("yaml", title)
    tickets = json.loads(export)
    more = [
        {"ticket": i, "customer": f"c-{i % 9}", "log": [{"sender": "client", "text": f"Is {i} even?"},
                                                       {"sender": "agent", "text": "Yes." if i % 2 else "No."}]}
        for i in range(60)
    ]  # fmt: skip
    Path("export.json").write_text(",\n".join(json.dumps(ticket) for ticket in tickets + more).join("[]"))
    jsonl([chat(f"One {i}?", "two") for i in range(40)], "general.jsonl")
    recipe = recipe_from(yaml.safe_load(text), [])
    with pytest.raises(DataError) as caught:
        prepare(recipe.data, tokenizer, 0, tmp_path / "cache")
    promised = next(iter(re.findall(r"the next step says ``(.*?)``", GUIDE.replace("\n   ", " "), flags=re.S)))
    assert promised in str(caught.value)
    values = yaml.safe_load(text)
    values["data"]["train"][0]["roles"]["agent"] = "assistant"
    prepared = prepare(recipe_from(values, []).data, tokenizer, 0, tmp_path / "cache")
    assert prepared.report.sources[0].examples == 61 and any("10.0% of what is learned" in note for note in prepared.report.notes)
    customer = {f"export.json:{line}": ticket["customer"] for line, ticket in enumerate(tickets + more, 1)}
    train, held = (
        {customer[place] for place in map(part.where, part.example_ids) if place in customer}
        for part in (prepared.train, prepared.eval["export"])
    )
    assert len(train) > 1 and held and not train & held


def test_the_mixture_is_as_it_is_printed(
    tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("tickets", 400), ("manuals", 100), ("general", 600)):
        jsonl([chat(f"{name} {i:03}?", "two") for i in range(count)], f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    config = DataConfig(**yaml.safe_load(blocks("yaml", "Mixing")[0])["data"], tokens=64)
    prepared = prepare(config, tokenizer, 0, tmp_path / "cache")
    assert [n for n in prepared.report.notes if "an epoch" in n] == blocks("", "Mixing")[0].splitlines()


def test_the_example_runs(tokenizer: Any, jsonl: Any, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl([chat(f"One {i}?", "two") for i in range(30)], "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)[0], names)
    assert names["batch"].input_ids.shape == (8, 2048)
