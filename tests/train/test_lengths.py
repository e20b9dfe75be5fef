"""What a plan knows of the data: the lengths of its documents, from the sets themselves or from the cache."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli.main import app
from halfbyte.data import prepare as preparing
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import prepare
from halfbyte.recipe import recipe_from
from halfbyte.train.lengths import known, lengths
from support import tiny_tokenizer, write_jsonl

pytestmark = pytest.mark.usefixtures("cache")


def values(files: Path, *more: dict[str, Any]) -> dict[str, Any]:
    data = {"train": [{"path": str(files / "chats.jsonl")}, *more], "tokens": 160, "eval": 0.1}
    return {"model": str(files / "model"), "compute": "fp32", "data": data, "train": {"batch": 4, "epochs": 2.5}}


def test_they_are_those_of_the_rows_that_the_loader_makes(files: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "The quick brown fox. " * n} for n in (1, 30)])
    recipe = recipe_from(values(files, {"path": str(tmp_path / "texts.jsonl")}), [])
    prepared = prepare(recipe.data, tiny_tokenizer(), 0, tmp_path / "cache")
    loader = Loader(prepared.train, 160, 1, 0)
    batches = [loader.at(row) for row in range(loader.rows(0))]
    bounds = [sorted(set(batch.cu_seqlens[0].tolist())) for batch in batches]
    sizes = [[stop - start for start, stop in pairwise(row)] for row in bounds]
    owned = [size for row, batch in zip(sizes, batches, strict=True) for size in row[: len(batch.example_ids[0])]]
    found = lengths(prepared, recipe)
    assert (found.documents, found.tokens, found.shortest, found.longest) == (len(owned), sum(owned), min(owned), max(owned))
    assert found.document == pytest.approx(sum(s * s for row in sizes for s in row) / (160 * len(batches)))
    assert found.rows == len(batches) and found.efficiency == pytest.approx(sum(owned) / (160 * len(batches)))
    assert found.steps == Loader(prepared.train, 160, 4, 0).steps(2.5)
    assert lengths(prepared, recipe_from(values(files), ["train.max_steps=3"])).steps == 3


@pytest.mark.cpu
def test_a_plan_takes_them_from_the_cache_and_prepares_nothing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    recipe = recipe_from(values(files), [])

    def planned(*more: str) -> dict[str, Any]:
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(values(files)))
        said = CliRunner().invoke(app, ["plan", str(file), "--gpu", "rtx4090", "--json", *more])
        assert said.exit_code == 0, said.output
        found: dict[str, Any] = json.loads(said.stdout)
        return found

    assert known(recipe) is None and planned()["lengths"] is None
    assert not (tmp_path / "cache" / "tokens").exists()
    prepared = prepare(recipe.data, tiny_tokenizer(), recipe.train.seed, tmp_path / "cache")
    monkeypatch.setattr(preparing, "_write", lambda *_: pytest.fail("a plan tokenises nothing"))
    found = planned()
    assert found["lengths"]["rows"] == prepared.report.rows and found["steps"] == lengths(prepared, recipe).steps
    assert found["run_seconds"] == pytest.approx(found["steps"] * found["seconds"])
    assert halfbyte.plan(recipe, "rtx4090").steps == found["steps"], "in Python as on the command line"
    assert planned("data.tokens=320")["lengths"]["row"] == 320, "rows are laid anew, from the same tokens"
    for change in ("data.template=alpaca", f"data.train=[{files / 'gone.jsonl'}]", "data.train=[some/dataset]"):
        assert planned(change)["lengths"] is None, change
