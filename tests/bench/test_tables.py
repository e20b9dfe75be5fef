"""The tables of docs/concepts/quality.md and speed.md are those of the raw results, and the prose quotes them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONCEPTS, RESULTS = ROOT / "docs" / "concepts", ROOT / "bench" / "results"
TABLES = [
    ("quality.md", "quality", "quality", "2026-11-22-h200-quality.jsonl"),
    ("speed.md", "throughput", "throughput", "2026-11-22-h200-throughput.jsonl"),
    ("speed.md", "kernels", "kernels_gpu", "2026-11-22-h200-kernels.jsonl"),
]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "marker", "bench", "results"), TABLES, ids=lambda value: str(value))
def test_a_table_is_made_from_the_raw_results(page: str, marker: str, bench: str, results: str) -> None:
    text = (CONCEPTS / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {marker} -->\n(.*?)\n?<!-- /{marker} -->", text, re.DOTALL)
    assert found, f"{page} has no markers `{marker}`"
    assert results in text
    assert found[1] == script(bench).markdown(RESULTS / results)


def test_the_prose_quotes_the_tables() -> None:
    quality, speed = ((CONCEPTS / name).read_text(encoding="utf-8") for name in ("quality.md", "speed.md"))
    table, prose = quality.split("<!-- /quality -->")
    assert "within two standard errors" in table and "(+5.53%)" in table and "5.5 %" in prose
    table, prose = speed.split("<!-- /throughput -->")
    for figure in ("12,783", "15,662", "13,987", "13,296", "54.8", "35.9", "40.2", "10.1", "7.8", "9.1"):
        assert figure in prose, figure
        assert figure in table, figure


def test_no_figure_of_the_kernels_without_their_proof() -> None:
    import json

    gate = json.loads((RESULTS / "2026-11-22-h200-kernels-gate.json").read_text())
    assert gate and not any(gate.values())
