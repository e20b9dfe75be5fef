"""The error table of docs/concepts/formats.md is what the code measures."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from halfbyte.formats.packed import Format

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "concepts" / "formats.md"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(marker: str) -> dict[tuple[str, int], str]:
    """The filled cells of a table in the docs, by format and block."""
    page = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", page, re.DOTALL)
    assert found, marker
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found[1].strip().splitlines()]
    return {(line[0], int(block)): cell for line in lines for block, cell in zip(head[1:], line[1:], strict=True) if cell}


def formats(bench: ModuleType) -> dict[tuple[str, int], Format]:
    return {(label, block): fmt for label, row in bench.formats().items() for block, fmt in row.items()}


def test_the_tables_have_every_format_with_its_bits() -> None:
    bench = script("format_error")
    expected = {
        key: f"{8 * fmt.nbytes(bench.NORMAL_SHAPE) / math.prod(bench.NORMAL_SHAPE):.3f}" for key, fmt in formats(bench).items()
    }
    assert cells("format-bits") == expected
    assert cells("format-error-normal").keys() == cells("format-error-model").keys() == expected.keys()


@pytest.mark.cpu
def test_the_errors_on_normal_weights_are_measured() -> None:
    bench = script("format_error")
    table, weights = cells("format-error-normal"), bench.normal()
    for key, fmt in formats(bench).items():
        # The seed is fixed; the margin is for another version's random numbers (4 million of them) and four digits.
        assert float(table[key]) == pytest.approx(bench.measure(fmt, weights)[1], rel=3e-3, abs=6e-5), key


def test_the_errors_of_block_64_are_measured() -> None:
    bench = script("format_error")
    table, weights = cells("format-error-normal"), [bench.normal()[0][:64]]
    for key, fmt in formats(bench).items():
        if key[1] == 64:
            assert float(table[key]) == pytest.approx(bench.measure(fmt, weights)[1], rel=1e-2), key
