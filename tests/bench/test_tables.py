"""The tables of docs/concepts are those of the raw results (`bench/tables.py`), and the prose quotes them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONCEPTS, RESULTS = ROOT / "docs" / "concepts", ROOT / "bench" / "results"
MARKERS = [
    "quality",
    "before",
    "kernels",
    "throughput",
    "profile",
    "attention",
    "optimizer",
    "decode",
    "generation",
    "gemv",
    "loss",
    "fp8",
    "roofline",
    "facts",
    "equivalence",
    "cards",
    "predicted",
    "far",
    "paged",
]


def bench(name: str) -> ModuleType:
    """A script of bench/, with its neighbours importable as they are when it runs."""
    if str(ROOT / "bench") not in sys.path:
        sys.path.append(str(ROOT / "bench"))
    return importlib.import_module(name)


@pytest.mark.parametrize("marker", MARKERS)
def test_a_table_is_made_from_the_raw_results(marker: str) -> None:
    tables = bench("tables")
    assert [entry[1] for entry in tables.TABLES] == MARKERS
    page, _, table, results = next(entry for entry in tables.TABLES if entry[1] == marker)
    text = (CONCEPTS / page).read_text(encoding="utf-8")
    found = tables.pattern(marker).search(text)
    assert found, f"{page} has no markers `{marker}`"
    assert results in text
    assert found[2] == tables.block(table, results), "run `python bench/tables.py`"


def test_the_prose_quotes_the_tables() -> None:
    quality, performance = ((CONCEPTS / name).read_text(encoding="utf-8") for name in ("quality.md", "performance.md"))
    table, prose = quality.split("<!-- /quality -->")
    assert "within two standard errors" in table and "(+5.53%)" in table and "5.5 %" in prose
    table, prose = performance.split("<!-- before -->")[1].split("<!-- /before -->")
    for figure in ("12,783", "15,662", "13,987", "13,296", "54.8", "35.9", "40.2", "10.1", "7.8", "9.1"):
        assert figure in prose, figure
        assert figure in table, figure


def test_the_readme_quotes_the_tables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = bench("tables")
    steps = tables.block(tables.throughput, "2026-11-22-h200-steps.jsonl")
    ratios = {
        line.split(" | ")[0].strip("| "): line.split()[-2]
        for line in steps.splitlines()
        if "| unsloth | " in line and "%" not in line
    }
    quoted = {
        "4 x 2,048, no recompute": "1.12 times",
        "4 x 2,048, full recompute, offloaded": "1.28 with",
        "4 x 2,048, `compute: fp8`": "1.62 with",
    }
    for case, words in quoted.items():
        assert f"{float(ratios[case]):.2f}" == words.split()[0] and words in readme, case
    assert f"{float(ratios['1B shape, 4 x 2,048']):.2f}" == "1.25" and "a 1B shape 1.25" in readme
    assert "| halfbyte | none | 62 |" in steps and "62 launches" in readme
    answers = tables.block(tables.generated, "2026-11-22-h200-generation.jsonl")
    assert (
        "| nf4+adapter | 1 | 421.4 |" in answers
        and "| bf16 | 1 | 231.8 |" in answers
        and "421 tokens/s" in readme
        and ": 232)" in readme
    )


def test_no_figure_of_the_kernels_without_their_proof() -> None:
    gate = json.loads((RESULTS / "2026-11-22-h200-kernels-gate.json").read_text())
    assert gate and not any(gate.values())


def test_throughput_shows_no_unproven_figure_and_compares_means(tmp_path: Path) -> None:
    def row(group: str, impl: str, speed: int, **more: object) -> dict[str, object]:
        figures = {"tokens_per_s": speed, "trained_tokens_per_s": speed, "step_s": 8192 / speed, "rows": 4, "tokens": 2048}
        memory = {"peak_GiB": 30.0, "reserved_GiB": 31.0, "driver_GiB": 32.0}
        return {"group": group, "impl": impl, "gate": "green", "share": 0.8, "launches": 2000, **figures, **memory, **more}

    rows = [
        {"group": "gate", "gate": "red", "compute": "fp8", "recompute": "none"},
        row("nocheckpoint", "halfbyte", 18000),
        row("nocheckpoint", "unsloth", 15000),
        row("nocheckpoint", "halfbyte", 19500),
        row("short", "halfbyte", 9999, gate="red"),
        row("70b", "halfbyte", 4096, layers=4, step_s=1.0, call=1),
        row("70b", "halfbyte", 8192, layers=2, step_s=0.6, call=1),
        row("70b", "unsloth", 4000, layers=4, call=1),
        row("70b", "peft-bnb-liger", 2048, layers=4, call=2),
        {"group": "launches", "impl": "halfbyte", "recompute": "none", "kernels_a_layer": 70.5},
        {"group": "cold", "impl": "halfbyte", "cache": "empty", "first_step_s": 12.3, "load_s": 4.0},
        {"group": "full", "failed": "no time left"},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    text = bench("tables").throughput(tmp_path / "r.jsonl")
    assert "9,999" not in text and "not proven" in text
    assert "| 4 x 2,048, no recompute | unsloth | 0 | 1.250 |" in text
    assert "70B, 4 layers: ours against unsloth 1.024 (call 1)." in text and "4 layers: ours against peft" not in text
    assert "200.0 ms a layer" in text and "| 70.5 |" in text and "12.3" in text


def test_what_the_readme_says_of_memory_is_what_was_measured() -> None:
    rows = bench("memory_tables").latest(RESULTS / "2026-11-22-h200-fits.jsonl")
    ran = [row for row in rows if "peak_GiB" in row]
    grid = bench("memory_tables").grid(RESULTS / "2026-11-22-h200-fits.jsonl")
    assert len(ran) > 40 and len(grid) > 40
    assert all(abs(r["predicted_GiB"] / r["peak_GiB"] - 1) < 0.01 for r in (*ran, *grid))
    rows = [r["tokens"] for r in (*ran, *grid)]
    leanest = next(r["peak_GiB"] for r in ran if r["what"] == "leanest" and r["head"] == "16bit")
    whole = next(r["peak_GiB"] for r in ran if r["what"] == "70b" and r["layers"] == 80)
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    longest = {r["card"]: r["tokens"] for r in ran if r["what"] == "longest"}
    beside = {r["card"]: r["whole_host_GiB"] for r in ran if r["what"] == "longest"}
    assert f"within 1 % for rows of {min(rows)} to {max(rows):,} tokens, an 8B shape in {leanest:.1f} GiB" in said
    assert f"with {longest[8]:,} tokens on an 8 GiB card and {longest[16]:,} on one of 16" in said
    assert f"({beside[8]:.0f} and {beside[16]:.0f} GiB of host memory beside), a 70B" in said
    assert f"a 70B shape with 4,096 tokens in {whole:.1f}." in said
