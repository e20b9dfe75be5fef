"""`halfbyte import` as a user meets it: files written, refusals with an exit code, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import Cli
from halfbyte.recipe import load_recipe
from importers.examples import AXOLOTL, UNSLOTH


def test_import_writes_a_recipe_that_loads(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "qlora.yml").write_text(AXOLOTL)
    said = cli("import", "qlora.yml", "--out", "r/recipe.yaml", "--processes", "4")
    assert (said.code, said.out) == (0, "")
    assert "qlora.yml: axolotl (by `base_model`)" in said.err
    assert "  micro_batch_size: 2, gradient_accumulation_steps: 4 -> train.batch: 32 (2 x 4 x 4 processes)" in said.err
    assert "halfbyte train r/recipe.yaml" in said.err
    recipe = load_recipe(tmp_path / "r" / "recipe.yaml")
    assert (recipe.train.batch, recipe.adapter.rank, recipe.data.tokens) == (32, 32, 4096)
    assert "r/recipe.yaml exists" in cli("import", "qlora.yml", "--out", "r/recipe.yaml").err
    assert cli("import", "qlora.yml", "--out", "r/recipe.yaml", "--force").code == 0
    shown = cli("import", "qlora.yml")
    (tmp_path / "shown.yaml").write_text(shown.out)
    assert shown.code == 0 and load_recipe(tmp_path / "shown.yaml").adapter == recipe.adapter


def test_a_refusal_has_an_exit_code_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "dpo.yml").write_text(AXOLOTL + "rl: dpo\ncontext_parapllel_size: 2\n")
    said = cli("import", "dpo.yml", "--out", "recipe.yaml")
    assert said.code == 1 and not (tmp_path / "recipe.yaml").exists()
    assert "error [import.refused]: not imported: `rl` asks for what is not built" in said.err
    assert "  line 44: rl: dpo: learning from preferences" in said.err
    assert "did you mean `context_parallel_size`?" in said.err
    assert cli("import", "dpo.yml", "--out", "recipe.yaml", "--partial").code == 0
    assert load_recipe(tmp_path / "recipe.yaml").adapter.rank == 32
    said = cli("import", "dpo.yml", "--json")
    assert said.code == 1 and [line["keys"] for line in json.loads(said.out)["report"] if line["kind"] == "refused"] == [["rl"]]


def test_import_as_json(cli: Cli) -> None:
    said = cli("import", UNSLOTH, "--json")
    found = json.loads(said.out)
    assert said.code == 0 and said.err == "" and found["tool"] == "unsloth"
    batch = next(line for line in found["report"] if line.get("to") == "train.batch")
    assert batch["result"] == found["recipe"]["train"]["batch"] == 32 and batch["why"] == "4 x 8 x 1 process"
    assert "hf_private" not in said.out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["nope.yml"], "there is no file nope.yml"),
        (["nope.yml", "--from", "axolot"], "did you mean `axolotl`?"),
        (["--", "trl", "sft", "--learning_rate", "$LR"], "shell variable"),
    ],
)
def test_mistakes(cli: Cli, args: list[str], told: str) -> None:
    said = cli("import", *args)
    assert (said.code, said.out) == (1, "") and told in said.err


def test_a_command_line_after_two_dashes(cli: Cli) -> None:
    said = cli("import", "--", "trl", "sft", "--model_name_or_path", "m", "--dataset_name", "org/d", "--use_peft", "--lora_r", "4")
    assert said.code == 0 and "rank: 4" in said.out
